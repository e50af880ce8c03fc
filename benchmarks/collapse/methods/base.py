"""What every method shares: the setup it is given and the plain training step."""

from __future__ import annotations

from collections.abc import Mapping
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
    """

    model: nn.Module
    anchors: Anchors
    run: RunSettings
    options: Mapping[str, Any]
    seed: int
    earlier: Earlier


class Method(Protocol):
    """A way of fine-tuning."""

    def step(self, batch: Batch) -> dict[str, float]:
        """Make one optimizer step on a task batch and return facts about it (``loss``, ...)."""


class Training:
    """One plain step: loss, gradients, ``optimizer.step()``, the run's learning-rate schedule."""

    def __init__(self, setup: Setup, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = setup.model, optimizer
        self._schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, setup.run.rate)

    def step(self, batch: Batch) -> dict[str, float]:
        """See :meth:`Method.step`."""
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._schedule.step()
        return {"loss": loss.item()}


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
