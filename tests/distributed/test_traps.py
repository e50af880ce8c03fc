"""What a step costs in messages, and optimizers that mix rows, when several processes train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import safeopt
from tests.distributed.jobs import Training, train
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.multi

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier")


def messages_of_a_step(kind: str, before: int) -> list[tuple[str, int, int]]:
    """Name, floats and group size of every collective in ``step`` number ``before`` + 1."""
    training = Training(kind).train(0, before)
    training.optimizer.zero_grad()
    training.backward(training.batches[before])
    seen: list[tuple[str, int, int]] = []

    def counting(name: str) -> Any:
        plain = getattr(dist, name)

        def call(first: Any, *args: Any, group: Any = None, **rest: Any) -> Any:
            size = first.numel() if isinstance(first, Tensor) else 0
            seen.append((name, size, dist.get_world_size(group)))
            return plain(first, *args, group=group, **rest)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    training.optimizer.step()
    return seen


@pytest.mark.trap("optimizers 5.4.1")
def test_replicas_exchange_nothing_between_refreshes() -> None:
    assert run_ranks(2, messages_of_a_step, "ddp", 1) == [[], []]


@pytest.mark.trap("optimizers 0.19", "optimizers 5.4.3", "optimizers 5.4.4")
@pytest.mark.parametrize(("kind", "world"), [("fsdp", 2), ("fsdp", 3), ("hsdp", 4)])
def test_a_step_takes_one_all_reduce_of_n_plus_one_floats(kind: str, world: int) -> None:
    """And a flag: is a gradient anywhere not finite. Among shards, not among their replicas."""
    shards = 2 if kind == "hsdp" else world
    flag, sums = ("all_reduce", 1, shards), ("all_reduce", 4 + 1, shards)
    assert run_ranks(world, messages_of_a_step, kind, 1) == [[flag, sums]] * world


def test_a_refresh_is_where_factors_are_gathered() -> None:
    for seen in run_ranks(2, messages_of_a_step, "fsdp", 3):  # the second refresh
        assert {name for name, _, _ in seen} >= {"all_reduce", "all_gather"}


def muon_steps(kind: str) -> dict[str, Tensor]:
    training = Training(kind)
    groups: list[dict[str, Any]] = []
    for name, p in training.model.named_parameters():
        is_hidden = p.ndim == 2 and "embed" not in name and "lm_head" not in name
        groups.append({"params": [(name, p)], "use_muon": is_hidden})
    training.optimizer = safeopt.SafeMuon(groups, lr=2e-3, adamw_eps=1e-3, guard=training.guard)
    return training.train().weights()


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return sum(float((left[name] - right[name]).square().sum()) for name in left) ** 0.5


@pytest.mark.trap("ux 2.3.9")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_muon_takes_the_steps_of_one_process(kind: str) -> None:
    """To the rounding of its Newton-Schulz iteration, which torch runs in bfloat16."""
    start, expected = Training("single").weights(), muon_steps("single")
    moved = distance(expected, start)
    for found in run_ranks(2, muon_steps, kind):
        assert distance(found, expected) < 0.03 * moved


def gradient_of_shards() -> str:

    training = Training("fsdp")
    batch = training.batches[0]
    loss = training.model(input_ids=batch, labels=batch).loss
    try:
        torch.autograd.grad(loss, list(training.model.parameters()), create_graph=True)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.trap("optimizers 0.8", "ux 2.3.2")
def test_autograd_grad_of_shards_is_still_refused_by_torch() -> None:
    """If this fails, exact products under fully_shard may have become possible."""
    for text in run_ranks(2, gradient_of_shards):
        assert "not have been used in the graph" in text


def gradients_of_replicas(reduce_through: str) -> tuple[Tensor, Tensor]:
    training = Training("ddp")
    rank = dist.get_rank()
    batch = training.batches[rank]
    loss = training.model(input_ids=batch, labels=batch).loss
    weight = training.model.module.lm_head.weight
    if reduce_through == "grad":
        (own,) = torch.autograd.grad(loss, [weight])
    else:
        loss.backward()
        own = weight.grad
    both = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(both, own)
    return both[0], both[1]


@pytest.mark.trap("ux 2.3.1")
def test_autograd_grad_is_not_averaged_over_replicas_but_a_guards_frame_is_shared() -> None:
    for way, alike in (("backward", True), ("grad", False)):
        for first, second in run_ranks(2, gradients_of_replicas, way):
            assert torch.equal(first, second) == alike
    expected = train("single")[1]
    for _, figures in run_ranks(2, train, "ddp"):
        for ours, theirs in zip(figures, expected, strict=True):
            assert ours["safety/anchor_loss"] == pytest.approx(theirs["safety/anchor_loss"])
