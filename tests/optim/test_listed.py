"""SafeAdamW's step on lists of parameters against its reference, on the operators' CPU path."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import safeopt
from safeopt.optim import adamw
from safeopt.optim.listed import takes_lists
from safeopt.optim.storage import Precision
from safeopt_kernels import dispatch, ops
from tests.optim.listed import MOVES, TOLERANCE, assert_same, pair, step_both
from tests.zoo import ARCHITECTURES, llama, random_anchors, take_training_step


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the lists also where no kernel runs: the operators then have their CPU path."""
    monkeypatch.setattr(adamw, "takes_lists", lambda *_: dispatch.mode() != "reference")


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("name", ["llama", "tied-llama", "gpt2", "lora-llama"])
def test_lists_are_the_reference(name: str) -> None:
    optimizers = pair(ARCHITECTURES[name]())
    step_both(optimizers)
    assert_same(optimizers, **TOLERANCE)


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("guard", MOVES, ids=str)
def test_every_move_is_the_reference(guard: dict[str, Any]) -> None:
    optimizers = pair(guard=guard)
    step_both(optimizers)
    assert_same(optimizers, **TOLERANCE)


@pytest.mark.usefixtures("listed")
def test_parameters_without_a_gradient_are_corrected_too() -> None:
    optimizers = pair()
    lists = [[p for g in o.param_groups for p in g["params"]] for o in optimizers]
    start = lists[0][1].detach().clone()
    for a, b in zip(*lists, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    lists[0][1].grad = lists[1][1].grad = None
    optimizers[0].step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEOPT_KERNELS", "reference")
        optimizers[1].step()
    torch.testing.assert_close(lists[0][1], lists[1][1], **TOLERANCE)
    assert not torch.equal(lists[0][1], start)


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_narrow_weights_round_as_the_reference_does(rounding: str) -> None:
    model = llama().to(torch.bfloat16)
    optimizers = pair(model, rounding=rounding, moments_dtype=torch.float32, lr=1e-2)
    step_both(optimizers, 3)
    for a, b in zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True):
        mine, theirs = (o.state[p] for o, p in zip(optimizers, (a, b), strict=True))
        assert mine.keys() == theirs.keys()
        assert mine["exp_avg"].dtype == torch.float32
        total = [p.float() for p in (a, b)]
        if rounding == "kahan":
            total = [
                t + s["compensation"].float() for t, s in zip(total, (mine, theirs), strict=True)
            ]
        # The lists round once and hand the step over in bf16, the reference rounds twice.
        bound = 0.02 if rounding == "kahan" else 3 * 2.0**-7
        scale = float(total[1].abs().max())
        assert float((total[0] - total[1]).abs().max()) <= bound * max(scale, 0.03)


@pytest.mark.usefixtures("listed")
def test_many_parameters_take_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    (optimizer, _), lengths = pair(ARCHITECTURES["lora-llama"]()), {"propose": [], "apply": []}
    propose, apply = ops.adamw_propose_, ops.low_rank_apply_
    monkeypatch.setattr(
        ops, "adamw_propose_", lambda p, *r: (lengths["propose"].append(len(p)), propose(p, *r))[1]
    )
    monkeypatch.setattr(
        ops,
        "low_rank_apply_",
        lambda p, *r, **k: (lengths["apply"].append(len(p)), apply(p, *r, **k))[1],
    )
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    for _ in range(3):  # the sketch of a LoRA adapter is taken twice at first
        lengths["propose"].clear()
        lengths["apply"].clear()
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    groups = [len(g["params"]) for g in optimizer.param_groups]
    assert lengths == {"propose": groups, "apply": [len(parameters)]}


@pytest.mark.usefixtures("listed")
def test_the_time_of_a_step_counts_both_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, _ = pair()
    propose, apply = ops.adamw_propose_, ops.low_rank_apply_
    monkeypatch.setattr(ops, "adamw_propose_", lambda *r: (time.sleep(0.2), propose(*r))[1])
    monkeypatch.setattr(
        ops, "low_rank_apply_", lambda *r, **k: (time.sleep(0.1), apply(*r, **k))[1]
    )
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.guard is not None
    assert optimizer.guard.metrics()["safety/step_ms"] >= 300


# -- who takes which way -----------------------------------------------------------------------


def test_on_the_cpu_the_reference_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEOPT_KERNELS", "auto")
    optimizer, _ = pair()
    assert optimizer.guard is not None
    assert not takes_lists(optimizer, optimizer.guard, Precision())


@pytest.mark.parametrize(
    ("options", "reason"),
    [({}, "the tensors are on the CPU"), ({"amsgrad": True}, "know no amsgrad=True")],
)
def test_kernels_asked_for_by_name_raise_before_anything_changes(
    options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    guard = safeopt.Guard(model, random_anchors())
    optimizer = safeopt.SafeAdamW(model.parameters(), guard=guard, **options)
    before = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setenv("SAFEOPT_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=reason):
        take_training_step(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


@pytest.mark.usefixtures("listed")
def test_compiled_step_takes_the_lists() -> None:
    optimizers = pair()
    optimizers[0].step = torch.compile(optimizers[0].step, backend="eager")  # type: ignore[method-assign]
    step_both(optimizers, 2)
    assert_same(optimizers, **TOLERANCE)


@pytest.mark.usefixtures("listed")
def test_shards_take_the_lists(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    try:
        model, anchors = llama(), random_anchors()
        whole = llama()
        whole.load_state_dict(model.state_dict())
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        ends = []
        for own, mode in ((model, None), (whole, "reference")):
            guard = safeopt.Guard(own, anchors, anchors_per_refresh=4)
            optimizer = safeopt.SafeAdamW(own.parameters(), lr=1e-3, guard=guard)
            torch.manual_seed(0)
            with pytest.MonkeyPatch.context() as patch:
                if mode is not None:
                    patch.setenv("SAFEOPT_KERNELS", mode)
                for _ in range(3):
                    take_training_step(own, optimizer)
            ends.append([getattr(p, "full_tensor", lambda p=p: p)() for p in own.parameters()])
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)
    finally:
        torch.distributed.destroy_process_group()
