"""What every method shares: the setup it is given and the plain training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.collapse.suite import Batch, RunSettings
from safeopt import Anchors


class Earlier(Protocol):
    """Gives a finished result of the same suite, seed and task."""

    def __call__(self, method: str, variant: str) -> Mapping[str, Any]:
        """The result's facts."""


@dataclass(frozen=True)
class Setup:
    """Everything a method may use.

    Attributes:
        model: the aligned model, to be changed in place.
        anchors: the pool of safety examples, the same for every method.
        run: steps, learning rate and batch size.
        options: the method's own settings, from the variants file.
        seed: seed of whatever the method draws.
        earlier: reads another method's result of the same suite, seed and task.
        base: builds the model as it was before alignment, for methods that need the two apart.
    """

    model: nn.Module
    anchors: Anchors
    run: RunSettings
    options: Mapping[str, Any]
    seed: int
    earlier: Earlier
    base: Callable[[], nn.Module]


@dataclass
class Spending:
    """What a run has cost so far, in rows that went through the model.

    Attributes:
        task_rows: forward-backwards of task rows.
        anchor_rows: forward-backwards of anchors.
        forward_rows: rows that went forward alone, through the model or an aligned copy.
    """

    task_rows: int = 0
    anchor_rows: int = 0
    forward_rows: int = 0


class Method(Protocol):
    """A way of fine-tuning."""

    @property
    def spent(self) -> Spending:
        """Rows so far, set-up included."""

    def step(self, batch: Batch) -> dict[str, float]:
        """Make one optimizer step on a task batch and return facts about it (``loss``, ...)."""

    def deployed(self) -> AbstractContextManager[None]:
        """Inside it the model holds the weights that the method would ship."""


class Training:
    """One plain step: loss, gradients, ``optimizer.step()``, the run's learning-rate schedule."""

    def __init__(self, setup: Setup, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.spent = setup.model, optimizer, Spending()
        self.parameters = [p for p in setup.model.parameters() if p.requires_grad]
        self._schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, setup.run.rate)

    def step(self, batch: Batch) -> dict[str, float]:
        """See :meth:`Method.step`."""
        facts = self.gradients(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._schedule.step()
        return facts

    def gradients(self, batch: Batch) -> dict[str, float]:
        """Leave in ``p.grad`` what the optimizer is to follow, and return facts about it."""
        loss = self.model(**batch).loss
        loss.backward()
        self.spent.task_rows += len(batch["input_ids"])
        return {"loss": loss.item()}

    def deployed(self) -> AbstractContextManager[None]:
        """The trained weights as they are."""
        return nullcontext()


def plain_adamw(setup: Setup) -> torch.optim.AdamW:
    """AdamW at the run's learning rate and weight decay."""
    return torch.optim.AdamW(
        setup.model.parameters(), lr=setup.run.lr, weight_decay=setup.run.weight_decay
    )


class Displacement:
    """The whole change that a step makes to the weights, measured from a snapshot."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._before = [torch.empty_like(p, requires_grad=False) for p in self.parameters]

    def start(self) -> None:
        """Remember the weights as they are now."""
        torch._foreach_copy_(self._before, [p.detach() for p in self.parameters])

    def taken(self) -> list[Tensor]:
        """What has been added to every parameter since :meth:`start`."""
        return [p.detach() - b for p, b in zip(self.parameters, self._before, strict=True)]

    def replace(self, change: list[Tensor]) -> None:
        """Set the weights to the snapshot plus ``change``."""
        for p, before, delta in zip(self.parameters, self._before, change, strict=True):
            p.detach().copy_(before + delta)


def norm(tensors: list[Tensor]) -> float:
    """Euclidean norm of a list of tensors taken as one vector."""
    return float(torch.stack(torch._foreach_norm(tensors)).norm())
