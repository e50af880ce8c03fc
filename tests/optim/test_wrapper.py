"""Any optimizer under a guard, real ones of other packages included."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import pytest
import schedulefree
import torch
import torchao.optim
from torch import Tensor, nn
from torch.optim import Optimizer

import safeopt
from safeopt.geometry import DenseSubspace
from safeopt.optim import reference
from tests.zoo import llama, random_anchors, take_training_step, trainable

Make = Callable[[Any], Optimizer]

TORCH: dict[str, Make] = {
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True),
}
WHOLE: dict[str, Make] = {
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "bitsandbytes AdamW8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2, min_8bit_size=256),
    "bitsandbytes Lion8bit": lambda p: bitsandbytes.optim.Lion8bit(p, lr=1e-3, min_8bit_size=256),
    "torchao AdamW8bit": lambda p: torchao.optim.AdamW8bit(p, lr=1e-2, block_size=64),
    "torchao AdamW4bit": lambda p: torchao.optim.AdamW4bit(p, lr=1e-2, block_size=64),
    "schedule-free AdamW": lambda p: schedulefree.AdamWScheduleFree(p, lr=1e-2),
    "schedule-free SGD": lambda p: schedulefree.SGDScheduleFree(p, lr=1.0),
}


def exact_guard(model: nn.Module, **options: Any) -> safeopt.Guard:
    anchors = random_anchors()
    options = {"compression_rank": None, "anchors_per_refresh": len(anchors), **options}
    return safeopt.Guard(model, anchors, **options)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """torchao compiles its step for each shape, which takes minutes and changes no figure here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("name", [*TORCH, *WHOLE])
def test_no_velocity_into_the_subspace(name: str) -> None:
    model = llama(hidden_size=64, intermediate_size=96)
    guard = exact_guard(model, refresh_every=3, retraction=False)
    inner = {**TORCH, **WHOLE}[name](model.parameters())
    optimizer = safeopt.guarded(inner, guard)
    if hasattr(inner, "train"):
        optimizer.train()
    moved = False
    for step in range(3):
        before = {name: p.detach().clone() for name, p in trainable(model).items()}
        take_training_step(model, optimizer)
        if step == 0:
            assert guard.sketch is not None
            shapes = {name: p.shape for name, p in before.items()}
            dense = DenseSubspace.from_sketch(guard.sketch, shapes)
            basis = dense.basis()
        change = {name: p.detach() - before[name] for name, p in trainable(model).items()}
        moved |= any(bool(delta.any()) for delta in change.values())
        assert dense.leak(change, basis) <= 1e-5
    assert moved
    assert guard.metrics()["safety/removed_fraction"] > 0


def trajectory(model: nn.Module, optimizer: Optimizer, batches: list[Tensor]) -> list[Tensor]:
    for batch in batches:
        take_training_step(model, optimizer, batch)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.trap("optimizers 0.20", "optimizers 5.1.24")
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"fused": True}])
def test_wrapping_adamw_is_safe_adamw(options: dict[str, Any]) -> None:
    base, anchors = llama(), random_anchors()
    batches = [torch.randint(0, 97, (4, 10)) for _ in range(6)]
    results = []
    for wrap in (False, True):
        model = copy.deepcopy(base)
        guard = safeopt.Guard(
            model, anchors, budget=-0.01, refresh_every=2, momentum_orthogonal=True
        )
        rest = {"lr": 1e-3, "weight_decay": 0.1, **options}
        if wrap:
            inner = torch.optim.AdamW(model.named_parameters(), **rest)
            optimizer: Optimizer = safeopt.guarded(inner, guard)
        else:
            optimizer = safeopt.SafeAdamW(model.named_parameters(), **rest, guard=guard)
        results.append(trajectory(model, optimizer, batches))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.trap("optimizers 0.20")
@pytest.mark.parametrize("name", TORCH)
def test_chunk_by_chunk_is_all_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, anchors = llama(), random_anchors()
    batches = [torch.randint(0, 97, (4, 10)) for _ in range(4)]
    results = []
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 2000)
    for separable in (True, False):
        model = copy.deepcopy(base)
        guard = safeopt.Guard(model, anchors, budget=-0.01, refresh_every=2)
        optimizer = safeopt.guarded(TORCH[name](model.parameters()), guard)
        if not separable:
            monkeypatch.setattr("safeopt.optim.wrapper._SEPARABLE", frozenset())
        results.append(trajectory(model, optimizer, batches))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.trap("ux 2.3.8")
def test_shared_group_state_moves_once_a_step() -> None:
    """Schedule-free keeps its step number k in the group: stepped in parts, it would run ahead."""
    model = llama()
    inner = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-3)
    optimizer = safeopt.guarded(inner, exact_guard(model))
    optimizer.train()
    for _ in range(3):
        take_training_step(model, optimizer)
    assert inner.param_groups[0]["k"] == 3


def test_it_stands_in_for_the_optimizer() -> None:
    model = llama()
    inner = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    optimizer = safeopt.guarded(inner, exact_guard(model))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("outer"))
    inner.register_step_post_hook(lambda *_: calls.append("inner"))
    take_training_step(model, optimizer)
    scheduler.step()
    assert calls == ["outer", "inner"]
    assert inner.param_groups[0]["lr"] == 5e-4
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert len(inner.state) == len(trainable(model))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    plain = torch.optim.AdamW(model.named_parameters())
    plain.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(plain.state_dict())


def twins(optimizer: Optimizer) -> Iterator[Any]:
    for make in (lambda o: pickle.loads(pickle.dumps(o)), copy.deepcopy):
        with pytest.warns(UserWarning, match=r"unguarded: call optimizer\.hold"):
            yield make(optimizer)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_copy_says_that_it_holds_no_guard(wrap: bool) -> None:
    model = llama()
    guard = exact_guard(model)
    if wrap:
        optimizer: Any = safeopt.guarded(torch.optim.AdamW(model.parameters()), guard)
    else:
        optimizer = safeopt.SafeAdamW(model.parameters(), guard=guard)
    take_training_step(model, optimizer)
    for twin in twins(optimizer):
        assert twin.guard is None
        twin.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.guard = None
        copy.deepcopy(optimizer).step()


@pytest.mark.trap("optimizers 5.1.4")
@pytest.mark.parametrize("name", ["AdamW", "schedule-free AdamW"])
def test_closure_runs_once_with_gradients(name: str) -> None:
    model = llama()
    optimizer = safeopt.guarded({**TORCH, **WHOLE}[name](model.parameters()), exact_guard(model))
    if name not in TORCH:
        optimizer.train()
    x, calls = torch.randint(0, 97, (2, 8)), []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss: Tensor = model(input_ids=x, labels=x).loss
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert len(calls) == 1


def test_lbfgs_evaluates_its_closure_as_often_as_it_likes() -> None:
    model = llama()
    guard = exact_guard(model, retraction=False)
    optimizer = safeopt.guarded(torch.optim.LBFGS(model.parameters(), max_iter=3), guard)
    x, calls = torch.randint(0, 97, (2, 8)), []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss: Tensor = model(input_ids=x, labels=x).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(calls) > 1
    assert guard.metrics()["safety/leak"] <= 1e-5


@pytest.mark.parametrize("bad_step", [1, 2])
@pytest.mark.parametrize("bad_call", [1, 3])
def test_a_later_gradient_that_is_not_finite_leaves_the_weights_and_the_next_step(
    bad_step: int, bad_call: int
) -> None:
    model = llama()
    inner = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    optimizer = safeopt.guarded(inner, exact_guard(model))
    x, calls = torch.randint(0, 97, (2, 8)), list[int]()

    def take_step(bad: int = 0) -> None:
        calls.clear()

        def closure() -> Tensor:
            calls.append(1)
            optimizer.zero_grad()
            loss: Tensor = model(input_ids=x, labels=x).loss
            (loss * torch.nan if len(calls) == bad else loss).backward()
            return loss

        optimizer.step(closure)

    if bad_step == 2:
        take_step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="the step was not taken"):
        take_step(bad_call)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    take_step()  # the gradients of the step that failed are stale, and the closure clears them
    assert len(calls) > 1
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


@pytest.mark.parametrize("name", ["AdamW", "schedule-free AdamW"])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str) -> None:
    model = llama()
    optimizer = safeopt.guarded({**TORCH, **WHOLE}[name](model.parameters()), exact_guard(model))
    if name not in TORCH:
        optimizer.train()
    take_training_step(model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def closure() -> float:
        for p in model.parameters():
            p.grad = torch.full_like(p, torch.nan)
        return 0.0

    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step(closure)
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)


def test_the_brake_shortens_the_step_and_lets_go() -> None:
    base, x = llama(), torch.randint(0, 97, (4, 10))
    lengths = []
    for brake in (1.0, 0.5):
        model = copy.deepcopy(base)
        guard = exact_guard(model, tangent=False, retraction=False, step_limit=None)
        optimizer = safeopt.guarded(WHOLE["torchao AdamW8bit"](model.parameters()), guard)
        guard.brake = brake
        take_training_step(model, optimizer, x)
        moves = [
            (p - q).detach() for p, q in zip(model.parameters(), base.parameters(), strict=True)
        ]
        lengths.append(float(torch.cat([m.flatten() for m in moves]).norm()))
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-2)
    assert lengths[1] / lengths[0] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.trap("optimizers 5.1.3")
def test_groups_added_later() -> None:
    model = llama()
    names = list(trainable(model).items())
    inner = torch.optim.Adagrad([p for _, p in names[:3]], lr=1e-2)
    optimizer = safeopt.guarded(inner, exact_guard(model))
    optimizer.add_param_group({"params": [p for _, p in names[3:]]})
    take_training_step(model, optimizer)
    with pytest.raises(ValueError, match="not in the guard's model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(inner.param_groups) == 2


@pytest.mark.parametrize("wrap", [False, True])
def test_a_guard_serves_one_optimizer_at_a_time(wrap: bool) -> None:
    def make(parameters: Any) -> Optimizer:
        if wrap:
            return safeopt.guarded(torch.optim.SGD(parameters, lr=1e-2), guard)
        return safeopt.SafeSGD(parameters, lr=1e-2, guard=guard)

    model = llama()
    guard, (first, *rest) = exact_guard(model), model.parameters()
    one = make([first])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"one optimizer all parameters.*or build one guard per"):
        make(rest)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    take_training_step(model, one)
    with pytest.raises(ValueError, match="another optimizer"):
        safeopt.SafeAdamW(rest).hold(guard)

    one.hold(exact_guard(model))  # and lets go of this one
    two = make(rest)
    two.host = [two]  # a cycle, as hosts make them
    del two
    three = make([first])
    four = make([first, *rest])  # takes the place of the third
    assert copy.deepcopy(three) is not four
    take_training_step(model, four)


def test_what_cannot_be_wrapped() -> None:
    model = llama()
    guard = exact_guard(model)
    with pytest.raises(ValueError, match="pass guard="):
        safeopt.guarded(safeopt.SafeAdamW(model.parameters()), guard)
    with pytest.raises(ValueError, match="not in the guard's model"):
        safeopt.guarded(torch.optim.SGD(llama().parameters()), guard)
    with pytest.raises(ValueError, match="capturable=True"):
        safeopt.guarded(torch.optim.NAdam(model.parameters(), capturable=True), guard)
    along = exact_guard(model, momentum_orthogonal=True)
    with pytest.raises(ValueError, match="momentum of AdamWScheduleFree"):
        safeopt.guarded(schedulefree.AdamWScheduleFree(model.parameters()), along)
    whole = safeopt.guarded(torch.optim.Rprop(model.parameters()), guard)
    with pytest.raises(ValueError, match="momentum of Rprop"):
        whole.hold(along)
    assert whole.guard is guard
