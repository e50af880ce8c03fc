"""The synthetic world's aligned Llama as a system: 16 anchors and one large task batch."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.collapse.world import World, as_batch
from safeopt.geometry import GradientSketch, find_coverage
from safeopt.geometry.capture import logits_of
from safeopt.isolation import undisturbed
from safeopt.losses import reply_nll

ANCHORS, ROWS = 16, 128
TASKS = ("style", "questions")  # of the world's tasks those that laws and schedules are measured on


class WorldSystem:
    """Anchor losses are reply NLLs; the task gradient is that of a fixed batch.

    Args:
        seed: of the world.
        task: its task.
    """

    def __init__(self, seed: int, task: str) -> None:
        world = World(seed)
        self.model = world.model().eval()
        anchors = world.anchors(task)
        spread = torch.linspace(0, len(anchors) - 1, ANCHORS).round().int().tolist()
        self._anchors = anchors.batch(spread)
        draw = torch.Generator().manual_seed(seed)
        self._task = as_batch(world.task_rows(task, "known", ROWS, draw))
        self._coverage = find_coverage(self.model)
        self.parameters: dict[str, Tensor] = dict(self.model.named_parameters())

    def losses(self) -> Tensor:
        """Anchor losses, (N,)."""
        with torch.no_grad(), undisturbed(self.model):
            return reply_nll(logits_of(self.model, self._anchors), self._anchors.labels)

    def gradients(self) -> GradientSketch:
        """The anchors' gradients, uncompressed."""
        return GradientSketch.measure(
            self.model, self._coverage, self._anchors, reply_nll, compression_rank=None
        )

    def velocity(self) -> dict[str, Tensor]:
        """-g."""
        with torch.enable_grad():
            loss = self.model(**self._task).loss
            found = torch.autograd.grad(loss, list(self.parameters.values()))
        return {name: -g for name, g in zip(self.parameters, found, strict=True)}
