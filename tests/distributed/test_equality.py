"""Several processes take the steps of one: weights and telemetry."""

from __future__ import annotations

import pytest
import torch

from safeopt.optim import adamw
from safeopt_kernels import native
from tests.distributed.jobs import Report, assert_equal, train
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.multi

CASES = [
    ("ddp", "llama", 1),
    ("ddp", "llama", 2),
    ("ddp", "tied-llama", 3),
    ("fsdp", "llama", 1),
    ("fsdp", "tied-llama", 2),
    ("fsdp", "gpt2", 3),  # 32 and 97 rows over 3: uneven shards
    ("fsdp", "lora-llama", 3),  # lora_A has 4 rows: the third shard is empty
    ("hsdp", "llama", 2),
    ("hsdp", "llama", 4),
]


@pytest.mark.trap("optimizers 0.19", "optimizers 5.1.5", "optimizers 5.1.10", "ux 2.3.3")
@pytest.mark.parametrize(("kind", "architecture", "world"), CASES)
def test_ranks_take_the_steps_of_one_process(kind: str, architecture: str, world: int) -> None:
    expected = train("single", architecture)
    assert any(figures["safety/retraction_ratio"] > 0 for figures in expected[1])
    for found in run_ranks(world, train, kind, architecture):
        assert_equal(found, expected)


def train_by_lists(kernels: str, architecture: str) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEOPT_KERNELS", kernels)
        patch.setattr(adamw, "takes_lists", lambda *_: True)
        return train("fsdp", architecture)


@pytest.mark.parametrize("kernels", ["auto", "native"])
def test_lists_take_empty_shards(kernels: str) -> None:
    obstacle = native.obstacle([torch.zeros(1)])
    if kernels == "native" and obstacle is not None:
        pytest.skip(obstacle)
    expected = train("single", "lora-llama")
    for found in run_ranks(3, train_by_lists, kernels, "lora-llama"):
        assert_equal(found, expected, atol=1e-5)  # what a step leaks that AMX tiles have taken
