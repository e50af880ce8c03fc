"""Checkpoints of a guarded run on several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from tests.distributed.jobs import Training, assert_equal, train
from tests.distributed.ranks import run_ranks

SHARDED = pytest.mark.supports(host="`fully_shard` x 2", feature="resume")
pytestmark = pytest.mark.multi

STEPS = 8  # refreshes come before steps 1, 4 and 7


def save(training: Training, style: str, folder: Path) -> None:
    if style == "dcp":
        model, optimizer = get_state_dict(training.model, training.optimizer)
        states = {"model": model, "optimizer": optimizer, "guard": training.guard}
        dcp.save(states, checkpoint_id=folder)
        return
    if style == "full":
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(training.model, training.optimizer, options=options)
    else:
        model, optimizer = training.model.state_dict(), training.optimizer.state_dict()
    guard = training.guard.state_dict()  # on every rank
    if dist.get_rank() == 0:
        states = {"model": model, "optimizer": optimizer, "guard": guard}
        torch.save(states, folder / "state.pt")
    dist.barrier()


def load(training: Training, style: str, folder: Path) -> None:
    if style == "dcp":
        model, optimizer = get_state_dict(training.model, training.optimizer)
        states: dict[str, Any] = {"model": model, "optimizer": optimizer, "guard": training.guard}
        dcp.load(states, checkpoint_id=folder)
        options = StateDictOptions()
    else:
        states = torch.load(folder / "state.pt", weights_only=True)
        training.guard.load_state_dict(states["guard"])
        options = StateDictOptions(full_state_dict=True)
    if style == "plain":
        training.model.load_state_dict(states["model"])
        training.optimizer.load_state_dict(states["optimizer"])
        return
    set_state_dict(
        training.model,
        training.optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
        options=options,
    )


def resume(kind: str, style: str, stop: int, folder: Path) -> tuple[Any, Any]:
    """Weights and figures of an uninterrupted run, and of one that went on from a checkpoint."""
    whole = Training(kind, "tied-llama", steps=STEPS).train(0, stop)
    save(whole, style, folder)
    whole.train(stop)
    again = Training(kind, "tied-llama", steps=STEPS)
    load(again, style, folder)
    again.train(stop)
    return (whole.weights(), whole.figures[stop:]), (again.weights(), again.figures)


@pytest.mark.trap("optimizers 0.14", "optimizers 5.1.22")
@pytest.mark.parametrize("stop", [3, 4])
@pytest.mark.parametrize(
    ("kind", "style"),
    [
        ("ddp", "plain"),
        pytest.param("fsdp", "full", marks=SHARDED),
        pytest.param("fsdp", "dcp", marks=SHARDED),
        ("hsdp", "dcp"),
    ],
)
def test_resume_is_bit_exact_across_a_refresh(
    tmp_path: Path, kind: str, style: str, stop: int
) -> None:
    for whole, again in run_ranks(2, resume, kind, style, stop, tmp_path):
        assert_equal(again, whole, atol=0)


def save_at(stop: int, folder: Path) -> None:
    save(Training("fsdp", "lora-llama", steps=STEPS).train(0, stop), "dcp", folder)


def go_on_from(stop: int, folder: Path) -> Any:
    training = Training("fsdp", "lora-llama", steps=STEPS)
    load(training, "dcp", folder)
    training.train(stop)
    return training.weights(), training.figures


@pytest.mark.trap("optimizers 5.1.11")
def test_a_checkpoint_of_three_ranks_is_loaded_by_one_and_by_two(tmp_path: Path) -> None:
    run_ranks(3, save_at, 4, tmp_path)
    weights, figures = train("single", "lora-llama", steps=STEPS)
    for world in (1, 2):
        for found in run_ranks(world, go_on_from, 4, tmp_path):
            assert_equal(found, (weights, figures[4:]))


def states_of_a_shard() -> tuple[Any, Any]:
    training = Training("fsdp").train(0, 2)
    sketch = training.guard.frame.sketch
    block = sketch.blocks["model.layers.0.mlp.up_proj.weight"][0]
    left: Tensor = block.left  # type: ignore[attr-defined]
    return left, training.guard.state_dict()


def take_texts(state: Any) -> list[Any]:
    """What `torch.testing.assert_close` cannot compare, taken out."""
    (frame,), calibration = state["frame"], state["calibration"]
    return [frame.pop("names"), calibration.pop("anchors"), calibration.pop("reference")]


@pytest.mark.trap("ux 0.4")
def test_trap_plain_state_of_each_rank_becomes_rank_zeros() -> None:
    """Full checkpoints keep rank 0's copy of a plain tensor: so the state is alike everywhere."""
    (first, one), (second, other) = run_ranks(2, states_of_a_shard)
    assert not torch.equal(first, second)
    assert take_texts(one) == take_texts(other)
    for state in (one, other):  # clocks and sizes of each process's own
        figures = state.pop("metrics")[0]
        assert {"safety/refresh_ms", "safety/step_ms"} <= figures.keys()
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    (frame,) = one["frame"]
    block = frame["sketch"]["blocks"]["model.layers.0.mlp.up_proj.weight"]["0"]
    torch.testing.assert_close(block["left"], torch.cat([first, second], 2), rtol=0, atol=0)


def make_state_with_a_fake_step() -> tuple[Any, Any, Any]:
    training = Training("fsdp")
    before = training.weights()
    get_state_dict(training.model, training.optimizer)  # steps with zero gradients and lr = 0
    assert len(training.optimizer.state) == len(list(training.model.parameters()))
    assert training.guard.sketch is None
    assert training.guard.basis_age == 0
    after = training.weights()
    training.train()
    return before, after, (training.weights(), training.figures)


@pytest.mark.trap("optimizers 0.13")
def test_trap_dcp_makes_state_by_a_step_with_learning_rate_zero() -> None:
    expected = train("single")[1]
    for before, after, (_, figures) in run_ranks(2, make_state_with_a_fake_step):
        torch.testing.assert_close(before, after, rtol=0, atol=0)
        assert figures[0]["safety/anchor_loss"] == pytest.approx(
            expected[0]["safety/anchor_loss"], abs=1e-6
        )
        assert [f["safety/basis_age"] for f in figures] == [1, 2, 3, 1, 2]
