from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import optim_inputs_func_adamw

import safeopt
from safeopt.geometry import DenseSubspace
from safeopt.geometry.capture import logits_of
from safeopt.losses import reply_nll
from tests.zoo import ARCHITECTURES, llama, random_anchors, take_training_step, trainable

IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def core_inputs() -> Iterator[Any]:
    for case in optim_inputs_func_adamw(torch.device("cpu"), dtype=torch.float32):
        for name, flags in IMPLEMENTATIONS.items():
            tensors = any(isinstance(v, torch.Tensor) for v in case.kwargs.values())
            if not (tensors and name == "foreach"):
                yield pytest.param({**case.kwargs, **flags}, id=f"{case.desc}-{name}")


@pytest.mark.parametrize("options", list(core_inputs()))
def test_without_guard_is_adamw_bit_for_bit(options: dict[str, Any]) -> None:
    ours = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    theirs = copy.deepcopy(ours)
    a = safeopt.SafeAdamW(ours.parameters(), **copy.deepcopy(options))
    b = torch.optim.AdamW(theirs.parameters(), **copy.deepcopy(options))
    for _ in range(6):
        x = torch.randn(4, 7)
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
        assert a.state[p].keys() == b.state[q].keys()
        assert all(torch.equal(a.state[p][key], b.state[q][key]) for key in a.state[p])


@pytest.mark.trap("optimizers 5.1.7")
def test_state_dicts_interchange_with_adamw() -> None:
    model = llama()
    guard = safeopt.Guard(model, random_anchors())
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-3, guard=guard)
    take_training_step(model, optimizer)
    plain = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    plain.load_state_dict(optimizer.state_dict())
    assert plain.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(plain.state_dict())
    take_training_step(model, optimizer)


@pytest.mark.trap("optimizers 5.1.4", "optimizers 5.1.6")
@pytest.mark.parametrize("with_guard", [False, True])
def test_hooks_fire_once_and_closures_have_gradients(with_guard: bool) -> None:
    torch.optim.AdamW(nn.Linear(1, 1).parameters())  # torch wraps AdamW.step from here on
    model = llama()
    guard = safeopt.Guard(model, random_anchors()) if with_guard else None
    optimizer = safeopt.SafeAdamW(model.parameters(), lr=1e-3, guard=guard)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    x = torch.randint(0, 97, (2, 8))

    def closure() -> torch.Tensor:
        calls.append("closure")
        optimizer.zero_grad()
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert calls == ["pre", "closure", "post"]


def test_pickled_and_copied_optimizers_still_step() -> None:
    layer = nn.Linear(3, 3)
    optimizer = safeopt.SafeAdamW(layer.parameters(), lr=0.1)
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert twin.guard is None
        twin.step()


@pytest.mark.trap("optimizers 5.1.21", "optimizers 5.1.23")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"amsgrad": True}, {"fused": True}])
def test_guarded_step_has_no_velocity_into_the_subspace(
    architecture: str, options: dict[str, Any]
) -> None:
    model, anchors = ARCHITECTURES[architecture](), random_anchors()
    guard = safeopt.Guard(
        model,
        anchors,
        compression_rank=None,
        anchors_per_refresh=len(anchors),
        refresh_every=3,
        retraction=False,
    )
    optimizer = safeopt.SafeAdamW(
        model.named_parameters(), lr=1e-2, weight_decay=0.1, guard=guard, **options
    )
    basis: torch.Tensor | None = None
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in trainable(model).items()}
        take_training_step(model, optimizer)
        if basis is None:
            assert guard.sketch is not None
            shapes = {name: p.shape for name, p in before.items()}
            dense = DenseSubspace.from_sketch(guard.sketch, shapes)
            basis = dense.basis()
        change = {name: p.detach() - before[name] for name, p in trainable(model).items()}
        assert dense.leak(change, basis) <= 1e-5
    assert guard.metrics()["safety/leak"] <= 1e-5
    assert 0 < guard.metrics()["safety/removed_fraction"] < 1


@pytest.mark.trap("optimizers 0.1", "ux 2.2.2")
def test_guarded_step_is_adamw_minus_its_projection() -> None:
    model, anchors = llama(), random_anchors()
    twin = copy.deepcopy(model)
    guard = safeopt.Guard(model, anchors, retraction=False, compression_rank=None)
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, guard=guard)
    plain = torch.optim.AdamW(twin.named_parameters(), lr=1e-2)
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    x = torch.randint(0, 97, (4, 10))
    take_training_step(model, optimizer, x)
    take_training_step(twin, plain, x)
    assert guard.sketch is not None
    step = {name: p.detach() - start[name] for name, p in twin.named_parameters()}
    dense = DenseSubspace.from_sketch(guard.sketch, {name: p.shape for name, p in start.items()})
    basis = dense.basis()
    flat = torch.cat([step[name].flatten().double() for name in dense.gradients])
    flat = flat - basis @ (basis.T @ flat)
    moved = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    ours = torch.cat([moved[name].flatten() for name in dense.gradients])
    torch.testing.assert_close(ours.double(), flat, rtol=1e-4, atol=1e-7)


def test_retraction_brings_the_anchors_back_at_no_first_order_cost() -> None:
    model, anchors = llama(), random_anchors(4)
    guard = safeopt.Guard(
        model, anchors, budget=-0.02, damping=1e-3, retraction_cap=1e6, compression_rank=None
    )
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-6, guard=guard)
    batch = anchors.batch()
    before = reply_nll(logits_of(model.eval(), batch), batch.labels).detach()
    take_training_step(model, optimizer)
    after = reply_nll(logits_of(model.eval(), batch), batch.labels).detach()
    torch.testing.assert_close(before - after, torch.full((4,), 0.02), rtol=0.3, atol=0)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_retraction_is_orthogonal_to_the_momentum(orthogonal: bool) -> None:
    model = llama()
    guard = safeopt.Guard(
        model,
        random_anchors(),
        budget=-1.0,
        step_limit=None,
        tangent=False,
        momentum_orthogonal=orthogonal,
    )
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, weight_decay=0, guard=guard)
    twin = copy.deepcopy(model)
    plain = torch.optim.AdamW(twin.named_parameters(), lr=1e-2, weight_decay=0)
    x = torch.randint(0, 97, (4, 10))
    take_training_step(model, optimizer, x)
    take_training_step(twin, plain, x)
    v = [
        p.detach() - q.detach() for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    ]
    m = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    dot = sum(float((a * b).sum()) for a, b in zip(v, m, strict=True))
    scale = (
        sum(float((a * a).sum()) for a in v) ** 0.5 * sum(float((b * b).sum()) for b in m) ** 0.5
    )
    assert (abs(dot) / scale < 1e-4) == orthogonal


@pytest.mark.trap("optimizers 5.1.16")
def test_lr_zero_is_the_identity() -> None:
    model = llama()
    guard = safeopt.Guard(model, random_anchors(), budget=-1.0)
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=0.0, guard=guard)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        take_training_step(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.trap("optimizers 5.1.3", "optimizers 5.1.5")
def test_parameters_without_gradient_and_groups() -> None:
    model = llama()
    named = list(trainable(model).items())
    groups = [
        {"params": named[:5], "weight_decay": 0.0},
        {"params": named[5:], "lr": 1e-3},
    ]
    guard = safeopt.Guard(model, random_anchors(), refresh_every=2)
    optimizer = safeopt.SafeAdamW(groups, lr=1e-2, guard=guard)
    group_ids = [id(g) for g in optimizer.param_groups]
    x = torch.randint(0, 97, (2, 8))
    model(input_ids=x, labels=x).loss.backward()
    named[2][1].grad = None
    optimizer.step()
    assert [id(g) for g in optimizer.param_groups] == group_ids
    assert named[2][1] not in optimizer.state
    assert named[3][1] in optimizer.state


@pytest.mark.trap("optimizers 5.1.5")
def test_guarded_steps_leave_gradients_alone() -> None:
    model = llama()
    guard = safeopt.Guard(model, random_anchors())
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, guard=guard)
    x = torch.randint(0, 97, (2, 8))
    model(input_ids=x, labels=x).loss.backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.trap("optimizers 5.1.18")
@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_options_that_a_guard_excludes(option: str) -> None:
    model = llama()
    guard = safeopt.Guard(model, random_anchors())
    with pytest.raises(ValueError, match=f"{option}=True"):
        safeopt.SafeAdamW(model.parameters(), guard=guard, **{option: True})
