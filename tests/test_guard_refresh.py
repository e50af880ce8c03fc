"""When a guard refreshes, of which parameters, and what stops it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import safeopt
from safeopt_kernels import native
from tests.zoo import VOCABULARY, llama, random_anchors, take_training_step, trainable


class Gated(nn.Module):
    """A layer behind a gate that is shut for good: its gradient is always zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.shut = nn.Linear(8, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        return self.head(x + 0.0 * self.shut(x))


def step_on_logits(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randint(0, VOCABULARY, (2, 8))).logsumexp(-1).sum().backward()
    optimizer.step()


def test_a_silent_parameter_is_looked_at_once_more_and_not_at_every_step() -> None:
    model, anchors = Gated(), random_anchors()
    guard = safeopt.Guard(model, anchors, refresh_every=4)
    optimizer = safeopt.SafeAdamW(model.parameters(), lr=1e-3, guard=guard)
    ages = []
    for _ in range(7):
        step_on_logits(model, optimizer)
        ages.append(guard.basis_age)
        resumed = safeopt.Guard(model, anchors, refresh_every=4)
        resumed.load_state_dict(copy.deepcopy(guard.state_dict()))
        assert resumed.state_dict()["schedule"] == guard.state_dict()["schedule"]
        assert resumed.frame.names == guard.frame.names
    assert ages == [1, 1, 2, 3, 4, 1, 2]


@pytest.mark.parametrize("transport", [True, False])
def test_parameters_that_join_or_leave_have_a_sketch_from_their_first_step_on(
    transport: bool,
) -> None:
    model = Gated()
    model.requires_grad_(False).head.requires_grad_(True)
    guard = safeopt.Guard(model, random_anchors(), refresh_every=9, transport=transport)
    optimizer = safeopt.SafeAdamW(model.head.parameters(), lr=1e-3, guard=guard)
    step_on_logits(model, optimizer)
    assert set(guard.frame.sketch.blocks) == {"head.weight", "head.bias"}
    model.embed.requires_grad_(True)
    step_on_logits(model, optimizer)
    assert guard.basis_age == 2  # the optimizer does not move it yet
    optimizer.add_param_group({"params": model.embed.parameters()})
    step_on_logits(model, optimizer)
    assert set(guard.frame.sketch.blocks) == {"head.weight", "head.bias", "embed.weight"}
    assert guard.basis_age == 1
    model.head.requires_grad_(False)
    step_on_logits(model, optimizer)
    assert set(guard.frame.sketch.blocks) == {"embed.weight"}
    assert guard.basis_age == 1


@pytest.mark.parametrize(
    ("make", "kernels"),
    [
        (safeopt.SafeAdamW, "reference"),
        (safeopt.SafeAdamW, "native"),
        (torch.optim.Rprop, "reference"),
    ],
)
def test_a_parameter_frozen_while_training_does_not_move(
    make: Any, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFEOPT_KERNELS", kernels)
    orthogonal = make is safeopt.SafeAdamW
    if kernels == "native" and (obstacle := native.obstacle([])) is not None:
        pytest.skip(obstacle)
    model = llama()
    guard = safeopt.Guard(model, random_anchors(), budget=-1.0, momentum_orthogonal=orthogonal)
    optimizer = (
        make(model.parameters(), lr=1e-2, guard=guard)
        if orthogonal
        else safeopt.guarded(make(model.parameters(), lr=1e-2), guard)
    )
    take_training_step(model, optimizer)
    frozen = model.lm_head.weight.requires_grad_(False)
    frozen.grad = None
    before = copy.deepcopy(model.state_dict())
    take_training_step(model, optimizer)
    assert guard.metrics()["safety/retraction_ratio"] > 0
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert moved == set(trainable(model))


class Kinked(nn.Module):
    """A model whose loss is finite and whose gradient is not, once ``kink`` is set."""

    kink = False

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        return self.head(x + (0 * x).square().sqrt() if self.kink else x)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_gradient_that_is_not_finite_under_a_finite_loss(rank: int | None) -> None:
    model = Kinked()
    guard = safeopt.Guard(model, random_anchors(), refresh_every=1, compression_rank=rank)
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, guard=guard)
    for _ in range(2):
        step_on_logits(model, optimizer)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    sketch = guard.sketch
    model.kink = True
    with pytest.raises(FloatingPointError, match="an anchor's gradient is not finite although"):
        optimizer.step()
    after = [model.state_dict(), optimizer.state_dict()["state"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert guard.sketch is sketch
