"""Gradients and weights as lists of tensors taken as one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Vector = Sequence[Tensor]


def take_gradients(parameters: Vector) -> list[Tensor]:
    """The gradients, zero where there is none, taken away from the parameters."""
    taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    set_gradients(parameters, [None] * len(parameters))
    return taken


def set_gradients(parameters: Vector, gradients: Sequence[Tensor | None]) -> None:
    """Put gradients where the optimizer looks for them."""
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient


def dot(left: Vector, right: Vector) -> float:
    """Inner product."""
    return float(sum((a * b).sum() for a, b in zip(left, right, strict=True)))


def copied(parameters: Vector) -> list[Tensor]:
    """The values as they are now."""
    return [p.detach().clone() for p in parameters]


def without_conflict(task: Vector, safety: Vector) -> list[Tensor]:
    """The task gradient without what opposes the safety gradient.

    g - min(0, <g, r>) / <r, r> r: unchanged unless the two point apart.
    """
    along, length = dot(task, safety), dot(safety, safety)
    if along >= 0 or length == 0:
        return list(task)
    return [g - along / length * r for g, r in zip(task, safety, strict=True)]


@torch.no_grad()
def pull(parameters: Vector, targets: Vector, strength: float) -> None:
    """Add the gradient of strength / 2 ||theta - target||^2 to ``p.grad``."""
    for p, target in zip(parameters, targets, strict=True):
        force = strength * (p.detach() - target)
        p.grad = force if p.grad is None else p.grad + force
