"""SafeSGD and SafeMuon: their base without a guard, tangent steps with one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import safeopt
from safeopt.geometry import DenseSubspace
from safeopt.optim import muon_groups
from tests.zoo import ARCHITECTURES, llama, random_anchors, take_training_step, trainable

Make = Callable[[Any, safeopt.Guard | None], Optimizer]

KINDS: dict[str, Make] = {
    "sgd": lambda p, g: safeopt.SafeSGD(p, lr=0.1, weight_decay=0.1, guard=g),
    "momentum": lambda p, g: safeopt.SafeSGD(p, lr=0.1, momentum=0.9, guard=g),
    "nesterov": lambda p, g: safeopt.SafeSGD(p, lr=0.1, momentum=0.9, nesterov=True, guard=g),
    "foreach": lambda p, g: safeopt.SafeSGD(p, lr=0.1, momentum=0.9, foreach=True, guard=g),
    "muon": lambda p, g: safeopt.SafeMuon(p, lr=1e-2, guard=g),
    "muon-rms": lambda p, g: safeopt.SafeMuon(
        p, lr=1e-2, adjust_lr_fn="match_rms_adamw", adamw_weight_decay=0.1, guard=g
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", KINDS)
def test_no_velocity_into_the_subspace(name: str, architecture: str) -> None:
    model, anchors = ARCHITECTURES[architecture](), random_anchors()
    guard = safeopt.Guard(
        model,
        anchors,
        compression_rank=None,
        anchors_per_refresh=len(anchors),
        refresh_every=2,
        retraction=False,
    )
    optimizer = KINDS[name](trainable(model).items(), guard)
    for step in range(2):
        before = {name: p.detach().clone() for name, p in trainable(model).items()}
        take_training_step(model, optimizer)
        if step == 0:
            assert guard.sketch is not None
            dense = DenseSubspace.from_sketch(
                guard.sketch, {name: p.shape for name, p in before.items()}
            )
            basis = dense.basis()
        change = {name: p.detach() - before[name] for name, p in trainable(model).items()}
        assert any(bool(delta.any()) for delta in change.values())
        assert dense.leak(change, basis) <= 1e-5
    assert 0 < guard.metrics()["safety/removed_fraction"] < 1


@pytest.mark.parametrize("name", ["momentum", "muon"])
def test_retraction_can_be_orthogonal_to_the_momentum(name: str) -> None:
    model = llama()
    guard = safeopt.Guard(
        model,
        random_anchors(),
        budget=-1.0,
        step_limit=None,
        tangent=False,
        momentum_orthogonal=True,
    )
    optimizer = KINDS[name](model.named_parameters(), guard)
    twin = copy.deepcopy(model)
    plain = KINDS[name](twin.named_parameters(), None)
    x = torch.randint(0, 97, (4, 10))
    take_training_step(model, optimizer, x)
    take_training_step(twin, plain, x)
    dot = square = 0.0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        state, v = optimizer.state[p], (p - q).detach().double()
        m = state["momentum_buffer"] if "momentum_buffer" in state else state["exp_avg"]
        dot += float((v * m).sum())
        square += float((v * v).sum() * (m * m).sum())
    assert square > 0
    assert abs(dot) / square**0.5 < 1e-3


def run(model: nn.Module, optimizers: list[Optimizer], batches: list[torch.Tensor]) -> None:
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_muon_is_torchs_muon_and_adamw() -> None:
    ours = llama()
    theirs = copy.deepcopy(ours)
    batches = [torch.randint(0, 97, (4, 10)) for _ in range(4)]
    options = {"adamw_lr": 3e-3, "adamw_betas": (0.8, 0.9), "adamw_weight_decay": 0.1}
    mixed = safeopt.SafeMuon(muon_groups(ours), lr=1e-2, **options)
    run(ours, [mixed], batches)
    matrices, rest = (g["params"] for g in muon_groups(theirs))
    plain = [
        torch.optim.Muon(matrices, lr=1e-2),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.8, 0.9), weight_decay=0.1),
    ]
    run(theirs, plain, batches)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
    for optimizer, group in zip(plain, mixed.param_groups, strict=True):
        for p, q in zip(optimizer.param_groups[0]["params"], group["params"], strict=True):
            assert optimizer.state[p].keys() == mixed.state[q].keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_muon_groups_of_language_models(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    matrices, *rest = muon_groups(model)
    names = {name for name, _ in matrices["params"]}
    assert names
    assert not [n for n in names if "embed" in n or "lm_head" in n or "wte" in n or "norm" in n]
    assert all(p.ndim == 2 for _, p in matrices["params"])
    others = {name for group in rest for name, _ in group["params"]}
    assert names | others == set(trainable(model))
    assert not names & others


def test_groups_that_do_not_say_are_split_by_shape() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = safeopt.SafeMuon(model.named_parameters(), lr=0.1, adamw_lr=0.2)
    assert [g["param_names"] for g in optimizer.param_groups] == [
        ["0.weight"],
        ["0.bias", "1.weight", "1.bias"],
    ]
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(2, 2)))], "lr": 0.3})
    assert optimizer.param_groups[-1]["use_muon"]
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        twin.add_param_group({"params": [("last", nn.Parameter(torch.ones(2)))]})
        assert not twin.param_groups[-1]["use_muon"]
    with pytest.raises(ValueError, match="use_muon=True is no matrix"):
        safeopt.SafeMuon([{"params": model.parameters(), "use_muon": True}])


def test_muon_state_survives_a_checkpoint() -> None:
    model = llama()
    twin = copy.deepcopy(model)
    batches = [torch.randint(0, 97, (4, 10)) for _ in range(4)]
    first = safeopt.SafeMuon(muon_groups(model), lr=1e-2)
    run(model, [first], batches[:2])
    second = safeopt.SafeMuon(muon_groups(twin), lr=0.5)
    twin.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(model, [first], batches[2:])
    run(twin, [second], batches[2:])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_sgd_excludes_what_a_guard_cannot() -> None:
    model = llama()
    with pytest.raises(ValueError, match="differentiable=True"):
        safeopt.SafeSGD(
            model.parameters(), differentiable=True, guard=safeopt.Guard(model, random_anchors())
        )
