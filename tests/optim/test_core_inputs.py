"""torch's own optimizer inputs over ours without a guard: the same bits, or the same error."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

import safeopt

OURS: dict[type[Optimizer], type[Optimizer]] = {
    torch.optim.AdamW: safeopt.SafeAdamW,
    torch.optim.SGD: safeopt.SafeSGD,
    torch.optim.Muon: safeopt.SafeMuon,
}
INFOS: list[OptimizerInfo] = [info for info in optim_db if info.optim_cls in OURS]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
SHAPES = ((7, 5), (5, 7), (3,), (), (0, 3), (4, 4), (2, 3, 4))
DEAD = 5  # the parameter that never has a gradient


def core_inputs() -> Iterator[Any]:
    """Every configuration that torch tests, those it keeps for CUDA included."""
    for info in INFOS:
        seen = set()
        for device in ("cpu", "cuda"):
            for case in _get_optim_inputs_including_global_cliquey_kwargs(device, None, info):
                if case.desc not in seen:
                    seen.add(case.desc)
                    label = f"{info.name}-{case.desc}".replace(" ", "_")
                    yield pytest.param(info, case.kwargs, id=label)


def parameters(info: OptimizerInfo, dtype: torch.dtype, is_leaf: bool) -> list[Tensor]:
    """Scalars, empty, transposed and dead ones among them; matrices alone for Muon."""
    torch.manual_seed(0)
    shapes = [s for s in SHAPES if len(s) == 2] if info.name == "Muon" else SHAPES
    made = [torch.randn(shape, dtype=dtype) for shape in shapes]
    made[1] = made[1].T.contiguous().T
    for p in made:
        p.requires_grad_()
    return made if is_leaf else [p.clone() for p in made]


def outcome(
    kind: type[Optimizer], info: OptimizerInfo, options: dict[str, Any], dtype: torch.dtype
) -> Any:
    """Weights, state and groups after some steps, or the error of the constructor or a step."""
    params = parameters(info, dtype, is_leaf=not options.get("differentiable"))
    try:
        optimizer = kind(params, **copy.deepcopy(options))
        for step in range(5):
            for i, p in enumerate(params):
                if i != DEAD:
                    p.grad = torch.zeros_like(p) if step == 1 else torch.randn_like(p)
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.5
    except Exception as error:
        return repr(error)
    groups = [
        {k: v for k, v in g.items() if k not in ("params", "use_muon")}
        for g in optimizer.param_groups
    ]
    state = [optimizer.state.get(p, {}) for p in params]
    return [p.detach() for p in params], state, groups


@pytest.mark.trap("optimizers 5.1.2")
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("info", "options"), list(core_inputs()))
def test_without_a_guard_every_bit_is_torchs(
    info: OptimizerInfo, options: dict[str, Any], dtype: torch.dtype
) -> None:
    is_fused_momentum = info.name == "SGD" and options.get("fused") and options.get("momentum")
    if is_fused_momentum and dtype is torch.bfloat16:
        pytest.skip("torch's fused SGD reads an uninitialised momentum here: no two runs agree")
    theirs = outcome(info.optim_cls, info, options, dtype)
    ours = outcome(OURS[info.optim_cls], info, options, dtype)
    if isinstance(theirs, str):
        assert ours == theirs
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_most_inputs_run_and_do_not_only_fail_alike() -> None:
    cases = [p.values for p in core_inputs()]
    ran = [c for c in cases if not isinstance(outcome(c[0].optim_cls, *c, torch.float32), str)]
    assert len(ran) >= 0.8 * len(cases) >= 60


def error_inputs() -> Iterator[Any]:
    for info in INFOS:
        for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            desc = error.optimizer_error_input.desc
            yield pytest.param(info, error, id=f"{info.name}-{desc}".replace(" ", "_"))


@pytest.mark.trap("optimizers 5.1.1")
@pytest.mark.parametrize(("info", "error"), list(error_inputs()))
def test_wrong_arguments_raise_as_in_torch(info: OptimizerInfo, error: Any) -> None:
    case = error.optimizer_error_input
    params = [torch.ones(2, 2, requires_grad=True)] if case.params is None else case.params
    if case.desc == "only support 2D parameters":  # SafeMuon gives them to AdamW
        safeopt.SafeMuon(params).step()
        return
    kind = OURS[info.optim_cls]
    if error.error_type is UserWarning:
        with pytest.warns(UserWarning, match=error.error_regex):
            kind(params, **case.kwargs)
    elif error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(error.error_type, match=error.error_regex):
            kind(params, **case.kwargs)
    else:
        optimizer = kind(params, **case.kwargs)
        with pytest.raises(error.error_type, match=error.error_regex):
            optimizer.step()


@pytest.mark.parametrize("options", [{"foreach": True}, {"differentiable": True}])
@pytest.mark.parametrize("kind", [safeopt.SafeAdamW, safeopt.SafeSGD])
def test_fused_excludes(kind: type[Optimizer], options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"fused.* (cannot be|does not support)"):
        kind([torch.ones(2, requires_grad=True)], fused=True, **options)


@pytest.mark.trap("optimizers 5.1.16")
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_schedulers_give_the_same_weights(info: OptimizerInfo) -> None:
    for schedulers in info.scheduler_inputs:
        ends = []
        for kind in (info.optim_cls, OURS[info.optim_cls]):
            params = parameters(info, torch.float32, is_leaf=True)
            optimizer = kind(params, lr=0.01)
            made = [make(optimizer) for make in schedulers]
            for _ in range(12):
                for p in params:
                    p.grad = torch.randn_like(p)
                optimizer.step()
                for scheduler in made:
                    takes_metric = "metrics" in inspect.signature(scheduler.step).parameters
                    scheduler.step(*([1.0] if takes_metric else []))
            ends.append(params)
        torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.trap("optimizers 5.1.1")
@pytest.mark.parametrize(("theirs", "ours"), OURS.items())
def test_constructor_begins_with_the_base_constructor(
    theirs: type[Optimizer], ours: type[Optimizer]
) -> None:
    base = list(inspect.signature(theirs).parameters.values())
    mine = list(inspect.signature(ours).parameters.values())
    assert [(p.name, p.kind) for p in mine][: len(base)] == [(p.name, p.kind) for p in base]
    assert [p.default for p in mine[: len(base)]] == [p.default for p in base]
    assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(base) :])
