from __future__ import annotations

import functools
import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.integrations import hosts
from tests.integrations.hosts import CountingGuard, Weights

# A fresh adapter is refreshed once more, after its first step.
REFRESHES = {"full": 2, "lora": 3}
KINDS = [
    pytest.param("full", marks=pytest.mark.supports(feature="full")),
    pytest.param("lora", marks=pytest.mark.supports(feature="LoRA")),
]


@functools.cache
def truth(kind: str) -> tuple[Weights, int]:
    trained, guard = hosts.run(hosts.plain, kind, Path("unused"))
    return trained, guard.refreshes


def assert_same_run(kind: str, trained: Weights, refreshes: int) -> None:
    expected, counted = truth(kind)
    assert refreshes == counted == REFRESHES[kind]
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_guard_and_training_move_the_weights_far_beyond_the_tolerance(
    kind: str, tmp_path: Path
) -> None:
    start = hosts.weights(hosts.make_model(kind))
    unguarded = hosts.make_model(kind)
    hosts.plain(unguarded, None, tmp_path)
    guarded, _ = truth(kind)
    free = hosts.weights(unguarded)
    for other in (start, free):
        assert max(float((guarded[name] - other[name]).abs().max()) for name in guarded) > 1e-3
    frozen = [name for name, p in hosts.make_model(kind).named_parameters() if not p.requires_grad]
    assert bool(frozen) == (kind == "lora")
    assert all(torch.equal(guarded[name], start[name]) for name in frozen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "host",
    [
        pytest.param("accelerate", marks=pytest.mark.supports(host="Accelerate")),
        pytest.param("trainer", marks=pytest.mark.supports(host="Trainer")),
        pytest.param("lightning", marks=pytest.mark.supports(host="Lightning")),
    ],
)
def test_every_host_takes_the_steps_of_a_plain_loop(host: str, kind: str, tmp_path: Path) -> None:
    trained, guard = hosts.run(hosts.HOSTS[host], kind, tmp_path)
    assert_same_run(kind, trained, guard.refreshes)


@pytest.mark.supports(host="SFTTrainer")
@pytest.mark.parametrize("kind", KINDS)
def test_sft_trainer_takes_the_steps_of_a_plain_loop(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    host = functools.partial(hosts.sft_trainer, tokenizer=tokenizer)
    trained, guard = hosts.run(host, kind, tmp_path)
    assert_same_run(kind, trained, guard.refreshes)


def start_processes(host: str, kind: str, folder: Path, world: int = 2) -> list[dict[str, Any]]:
    """Run a host in several processes; returns what each left behind."""
    context = multiprocessing.get_context("forkserver")  # imports once, no autograd to inherit
    context.set_forkserver_preload(["tests.integrations.hosts"])
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = [
        context.Process(target=hosts.worker, args=(rank, world, port, host, kind, folder))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.multi
@pytest.mark.supports(host="Accelerate, DDP x 2")
@pytest.mark.parametrize("kind", KINDS)
def test_two_accelerate_processes_take_the_steps_of_a_plain_loop(kind: str, tmp_path: Path) -> None:
    for left in start_processes("accelerate", kind, tmp_path):
        assert_same_run(kind, left["weights"], left["refreshes"])


def test_a_guard_counts_its_refreshes() -> None:
    model = hosts.make_model("full")
    guard = hosts.make_guard(model)
    assert isinstance(guard, CountingGuard)
    guard.refresh()
    assert guard.refreshes == 1
