"""Accelerate beyond the trajectory: what `prepare` does to an optimizer, and checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

import safeopt
from safeopt.integrations.accelerate import refuse_unsupported, register
from tests.integrations import loops
from tests.zoo import assert_equal_nested, llama, random_anchors, take_training_step


def make_accelerator(**options: Any) -> Accelerator:
    PartialState._reset_state()
    AcceleratorState._reset_state()
    return Accelerator(cpu=True, **options)


def prepared(
    accelerator: Accelerator, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, Any, safeopt.Guard]:
    model = loops.make_model("full").to(dtype)
    guard = loops.make_guard(model)
    optimizer = safeopt.SafeAdamW(loops.decayed(model), **loops.OPTIONS, guard=guard)
    model, wrapped = accelerator.prepare(model, optimizer)
    register(accelerator, guard)
    return model, wrapped, guard


def train(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, start: int, stop: int, size: int = 4
) -> None:
    for index, batch in enumerate(loops.loader(size)):
        if start <= index < stop:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.trap("optimizers 0.11", "optimizers 5.1.8")
def test_prepare_reloads_the_state_and_hides_the_guard() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without its guard")
        model, optimizer, guard = prepared(make_accelerator())
    assert not hasattr(optimizer, "guard")
    assert optimizer.optimizer.guard is guard
    assert not optimizer.state
    batch = next(iter(loops.loader()))
    model(**batch).loss.backward()
    optimizer.step()
    assert guard.metrics()["safety/basis_age"] == 1


@pytest.mark.trap("optimizers 0.12")
def test_parameters_swapped_after_construction_are_found_again() -> None:
    """What FSDP2 under Accelerate does: new Parameter objects, only param_groups rewritten."""
    accelerator = make_accelerator()
    trained = []
    for swap in (False, True):
        model, optimizer, _ = prepared(accelerator)
        if swap:
            new = {}
            for module in model.modules():
                for name, p in list(module.named_parameters(recurse=False)):
                    new[p] = nn.Parameter(p.detach().clone())
                    setattr(module, name, new[p])
            optimizer._switch_parameters(new)
        train(accelerator, model, optimizer, 0, 3)
        trained.append(loops.weights(model))
    torch.testing.assert_close(*trained, rtol=0, atol=0)


@pytest.mark.supports(host="Accelerate", feature="accumulation")
def test_accumulated_micro_batches_take_the_steps_of_whole_ones() -> None:
    trained = []
    for size in (4, 1):
        accelerator = make_accelerator(gradient_accumulation_steps=4 // size)
        model, optimizer, guard = prepared(accelerator)
        train(accelerator, model, optimizer, 0, 3 * 4 // size, size)
        assert guard.metrics()["safety/basis_age"] == 3
        trained.append(loops.weights(model))
    torch.testing.assert_close(*trained, rtol=0, atol=1e-6)


@pytest.mark.trap("ux 0.3", "optimizers 5.1.8")
@pytest.mark.supports(host="Accelerate", feature="resume")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resume_is_bit_exact_and_keeps_the_guard_wide(dtype: torch.dtype, tmp_path: Path) -> None:
    accelerator = make_accelerator()
    whole, optimizer, guard = prepared(accelerator, dtype)
    train(accelerator, whole, optimizer, 0, 7)
    accelerator.save_state(str(tmp_path))
    saved = guard.state_dict()
    train(accelerator, whole, optimizer, 7, 14)

    accelerator = make_accelerator()
    resumed, optimizer, again = prepared(accelerator, dtype)
    accelerator.load_state(str(tmp_path))
    assert_equal_nested(again.state_dict(), saved)
    # An optimizer's moments come back in the weights' dtype; what the guard knows must not.
    assert again.violation.dtype == torch.float64
    assert again.thresholds.dtype == guard.thresholds.dtype
    train(accelerator, resumed, optimizer, 7, 14)
    if dtype == torch.float64:
        torch.testing.assert_close(loops.weights(resumed), loops.weights(whole), rtol=0, atol=0)


@pytest.mark.trap("optimizers 5.1.19", "ux 2.3.4")
def test_deepspeed_and_fsdp1_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither starts here, so Accelerate is told that it runs them."""
    accelerator = make_accelerator()
    guard = loops.make_guard(loops.make_model("full"))
    shared = AcceleratorState._shared_state
    monkeypatch.setitem(shared, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO flattens .* use DDP, or FSDP2"):
        register(accelerator, guard)
    assert not accelerator._custom_objects
    monkeypatch.setitem(shared, "distributed_type", DistributedType.FSDP)
    for version, refused in ((1, True), (2, False)):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
        monkeypatch.setitem(shared, "fsdp_plugin", plugin)
        if refused:
            with pytest.raises(ValueError, match=r"FSDP1 .* use FSDP2 .*fsdp_version: 2"):
                refuse_unsupported(accelerator.state)
        else:
            refuse_unsupported(accelerator.state)


@pytest.mark.parametrize("reference", ["nll", "kl"])
def test_thresholds_are_those_of_the_precision_that_trains(reference: Any) -> None:
    accelerator = make_accelerator(mixed_precision="bf16")
    model = llama()
    guard = safeopt.Guard(model, random_anchors(8), budget=0.5, reference=reference)
    before = guard.thresholds.clone()
    accelerator.prepare(model)
    register(accelerator, guard)
    late = safeopt.Guard(model, guard.anchors, budget=0.5, reference=reference)
    assert torch.equal(guard.thresholds, late.thresholds)
    if reference == "nll":
        assert not torch.equal(guard.thresholds, before)
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, guard=guard)
    take_training_step(model, optimizer)
    guard.recalibrate()  # too late: the weights have moved
    assert torch.equal(guard.thresholds, late.thresholds)
