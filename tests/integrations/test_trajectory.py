"""The same weights after 20 steps with two refreshes, whatever host takes the steps."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.distributed.ranks import run_ranks
from tests.integrations import hosts, loops

# A fresh adapter is refreshed once more, after its first step.
REFRESHES = {"full": 2, "lora": 3}
KINDS = [
    pytest.param("full", marks=pytest.mark.supports(feature="full")),
    pytest.param("lora", marks=pytest.mark.supports(feature="LoRA")),
]


@functools.cache
def truth(kind: str) -> tuple[loops.Weights, int]:
    return loops.run(loops.plain, kind, Path("unused"))


def assert_same_run(kind: str, trained: loops.Weights, refreshes: int) -> None:
    expected, counted = truth(kind)
    assert refreshes == counted == REFRESHES[kind]
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_guard_and_training_move_the_weights_far_beyond_the_tolerance(kind: str) -> None:
    start = loops.weights(loops.make_model(kind))
    unguarded = loops.make_model(kind)
    loops.plain(unguarded, None, Path("unused"))
    guarded, _ = truth(kind)
    for other in (start, loops.weights(unguarded)):
        assert max(float((guarded[name] - other[name]).abs().max()) for name in guarded) > 1e-3
    frozen = [name for name, p in unguarded.named_parameters() if not p.requires_grad]
    assert bool(frozen) == (kind == "lora")
    assert all(torch.equal(guarded[name], start[name]) for name in frozen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "host",
    [
        pytest.param(loops.accelerate, marks=pytest.mark.supports(host="Accelerate")),
        pytest.param(hosts.trainer, marks=pytest.mark.supports(host="Trainer")),
        pytest.param(hosts.in_lightning, marks=pytest.mark.supports(host="Lightning")),
    ],
)
def test_every_host_takes_the_steps_of_a_plain_loop(
    host: loops.Host, kind: str, tmp_path: Path
) -> None:
    assert_same_run(kind, *loops.run(host, kind, tmp_path))


@pytest.mark.supports(host="SFTTrainer")
@pytest.mark.parametrize("kind", KINDS)
def test_sft_trainer_takes_the_steps_of_a_plain_loop(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    host = functools.partial(hosts.sft_trainer, tokenizer=tokenizer)
    assert_same_run(kind, *loops.run(host, kind, tmp_path))


@pytest.mark.multi
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "host",
    [
        pytest.param(loops.accelerate, marks=pytest.mark.supports(host="Accelerate, DDP x 2")),
        pytest.param(loops.fully_sharded, marks=pytest.mark.supports(host="`fully_shard` x 2")),
    ],
)
def test_two_processes_take_the_steps_of_a_plain_loop(
    host: loops.Host, kind: str, tmp_path: Path
) -> None:
    for trained, refreshes in run_ranks(2, loops.run_on_cpu, host, kind, tmp_path):
        assert_same_run(kind, trained, refreshes)
