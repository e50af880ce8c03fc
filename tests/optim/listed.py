"""Two equal models stepped with a guard: through the lists of the kernels, and by the reference."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import safeopt
from tests.zoo import llama, random_anchors

Pair = tuple[safeopt.SafeAdamW, safeopt.SafeAdamW]

# Two orders of the same fp32 sums; the steps are of length 1e-3 to 3e-3 an element.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}

MOVES: tuple[dict[str, Any], ...] = (
    {"budget": -1.0, "momentum_orthogonal": True},
    {"budget": -1.0, "refresh_every": 1},
    {"tangent": False},
    {"rank": 2, "compression_rank": None},
)


def pair(
    model: nn.Module | None = None, guard: dict[str, Any] | None = None, **options: Any
) -> Pair:
    """Optimizers of two copies of a model, with guards on the same anchors."""
    model = llama() if model is None else model
    anchors, made = random_anchors(), []
    for own in (model, copy.deepcopy(model)):
        held = safeopt.Guard(
            own, anchors, **{"refresh_every": 3, "anchors_per_refresh": 4, **(guard or {})}
        )
        groups = _groups(own)
        made.append(safeopt.SafeAdamW(groups, **{"lr": 1e-3, **options}, guard=held))
    return made[0], made[1]


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay, the rest without and at another learning rate."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in named if p.dim() > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0, "lr": 3e-3},
    ]
    return [group for group in groups if group["params"]]


def step_both(optimizers: Pair, count: int = 5) -> None:
    """Give both the same random gradients and step the second one by the reference."""
    lists = [[p for g in o.param_groups for p in g["params"]] for o in optimizers]
    for _ in range(count):
        for a, b in zip(*lists, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizers[0].step()
        with patch.dict("os.environ", {"SAFEOPT_KERNELS": "reference"}):
            optimizers[1].step()


def assert_same(optimizers: Pair, rtol: float, atol: float) -> None:
    """Weights, moments and what the guards report are the same up to a tolerance."""
    lists = [[p for g in o.param_groups for p in g["params"]] for o in optimizers]
    for a, b in zip(*lists, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
        mine, theirs = (o.state[p] for o, p in zip(optimizers, (a, b), strict=True))
        assert mine.keys() == theirs.keys()
        for key in mine:
            torch.testing.assert_close(mine[key].float(), theirs[key].float(), rtol=rtol, atol=atol)
    first, second = (o.guard.metrics() for o in optimizers)  # type: ignore[union-attr]
    assert first.keys() == second.keys()
    for key in first:
        if not key.endswith("_ms"):
            assert abs(first[key] - second[key]) <= 1e-4 + rtol * abs(second[key]), key
