"""What else can happen in a step when several processes train one model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import safeopt
from safeopt.passport.guard import PassportGuard
from tests.distributed.jobs import (
    GUARD,
    Report,
    Training,
    assert_equal,
    layers_of,
    shard,
    train,
)
from tests.distributed.ranks import run_ranks
from tests.zoo import llama, random_anchors

pytestmark = pytest.mark.multi


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_fewer_anchors_than_ranks(kind: str) -> None:
    expected = train("single", anchors_per_refresh=2)
    for found in run_ranks(3, train, kind, anchors_per_refresh=2):
        assert_equal(found, expected)


@pytest.mark.parametrize("options", [{"transport": False}, {"momentum_orthogonal": True}])
def test_other_settings(options: dict[str, Any]) -> None:
    expected = train("single", reference="kl", **options)
    for found in run_ranks(2, train, "fsdp", reference="kl", **options):
        assert_equal(found, expected, atol=5e-6)


# -- a failure on one rank is a failure on all, and changes nothing -------------------------------


def poison_gradient(training: Training) -> None:
    """NaN in the last row of the head: on the last rank's shard alone."""
    gradient = training.model.lm_head.weight.grad
    part = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    if dist.get_rank() == dist.get_world_size() - 1:
        part[-1] = float("nan")


def poison_anchors(training: Training) -> None:
    """An anchor loss that is NaN for the last rank's anchors alone."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        is_last = dist.get_rank() == dist.get_world_size() - 1
        return output * float("nan") if is_last else output

    training.model.get_submodule("lm_head").register_forward_hook(hook)


def fail(kind: str, poison: Any) -> tuple[str, bool]:
    training = Training(kind).train(0, 3)
    training.optimizer.zero_grad()
    training.backward(training.batches[3])
    if kind == "ddp":
        training.model = training.model.module
    poison(training)
    before = training.weights(), copy.deepcopy(training.optimizer.state_dict()["state"])
    try:
        training.optimizer.step()
    except FloatingPointError as error:
        after = training.weights(), training.optimizer.state_dict()["state"]
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        return str(error), True
    return "no error", False


@pytest.mark.parametrize(
    ("kind", "poison", "complaints"),
    [
        ("fsdp", poison_gradient, ("a parameter on another process", "'lm_head.weight'")),
        ("fsdp", poison_anchors, ("an anchor loss is not finite",) * 2),
        ("ddp", poison_anchors, ("an anchor loss is not finite",) * 2),
    ],
)
def test_a_nan_on_one_rank_raises_on_all_and_changes_nothing(
    kind: str, poison: Any, complaints: tuple[str, str]
) -> None:
    for (text, is_clean), complaint in zip(
        run_ranks(2, fail, kind, poison), complaints, strict=True
    ):
        assert complaint in text
        assert is_clean


def use_the_head_again(model: nn.Module) -> None:
    """Add what the head's matrix gives without its module: no hook of a guard sees it."""

    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + nn.functional.linear(inputs[0], module.weight)

    model.lm_head.register_forward_hook(hook)


def complaint_about_the_head() -> str:
    try:
        Training("ddp", prepare=use_the_head_again).train(0, 1)
    except ValueError as error:
        return str(error)
    return "no error"


def test_replicas_look_for_uses_of_a_weight_without_its_module() -> None:
    for text in run_ranks(3, complaint_about_the_head):
        assert "do not explain the gradients of ['lm_head.weight']" in text


def scale_with_an_infinity() -> list[bool]:
    training = Training("fsdp").train(0, 2)
    scaler = GradScaler("cpu", init_scale=8.0)
    training.optimizer.zero_grad()
    batch = training.batches[2]
    scaler.scale(training.model(input_ids=batch, labels=batch).loss).backward()
    if dist.get_rank() == 1:
        training.model.lm_head.weight.grad.to_local()[0, 0] = float("inf")
    before = training.weights(), copy.deepcopy(training.optimizer.state_dict()["state"])
    age = training.guard.basis_age
    scaler.step(training.optimizer)
    scaler.update()
    after = training.weights(), training.optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    return [training.guard.basis_age == age, scaler.get_scale() == 4.0]


@pytest.mark.trap("optimizers 5.1.13")
def test_grad_scaler_skips_on_all_ranks_and_touches_nothing() -> None:
    assert run_ranks(2, scale_with_an_infinity) == [[True, True]] * 2


# -- what hosts do to parameters ------------------------------------------------------------------


def swap_parameters_after_construction() -> Report:
    """What Accelerate does under FSDP2: prepare rewrites param_groups with new Parameters."""
    training = Training("single")
    names = [name for name, _ in training.model.named_parameters()]
    shard(training.model)
    swapped = dict(training.model.named_parameters())
    training.optimizer.param_groups[0]["params"] = [swapped[name] for name in names]
    training.train()
    return training.weights(), training.figures


@pytest.mark.trap("optimizers 0.12")
def test_trap_fully_shard_swaps_the_parameter_objects() -> None:
    expected = train("single")
    for found in run_ranks(2, swap_parameters_after_construction):
        assert_equal(found, expected)


def look_at_the_model_before_each_step() -> Report:
    """A forward without backward, which leaves the root's parameters whole."""
    training = Training("fsdp")
    for batch in training.batches:
        training.optimizer.zero_grad()
        training.backward(batch)
        with torch.no_grad():
            training.model(input_ids=batch)
        training.optimizer.step()
        training.figures.append(training.guard.metrics())
    return training.weights(), []


def test_trap_a_forward_without_backward_leaves_whole_parameters_behind() -> None:
    weights, _ = train("single")
    for found in run_ranks(2, look_at_the_model_before_each_step):
        assert_equal(found, (weights, []))


def accumulate(kind: str, parts: int) -> Report:
    training = Training(kind)
    for batch in training.batches:
        training.optimizer.zero_grad()
        training.backward(batch, parts)
        training.optimizer.step()
    return training.weights(), []


@pytest.mark.trap("optimizers 5.1.12")
@pytest.mark.parametrize(
    "kind",
    [
        "ddp",
        pytest.param(
            "fsdp", marks=pytest.mark.supports(host="`fully_shard` x 2", feature="accumulation")
        ),
    ],
)
def test_accumulated_micro_batches_take_the_same_steps(kind: str) -> None:
    weights, _ = train("single")
    for found in run_ranks(2, accumulate, kind, 6):
        assert_equal(found, (weights, []))


def hold_later() -> Report:
    """A guard that is built on the sharded model and handed over afterwards, as recipes do."""
    training = Training("fsdp")
    training.optimizer.guard = None
    training.optimizer.hold(training.guard)
    training.train()
    return training.weights(), training.figures


def test_an_optimizer_may_take_its_guard_later() -> None:
    expected = train("single")
    for found in run_ranks(2, hold_later):
        assert_equal(found, expected)


def checkpoint_layers(model: nn.Module, impl: CheckpointImpl) -> None:
    kinds = {type(layer) for layer in layers_of(model)}
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, checkpoint_impl=impl),
        check_fn=lambda m: type(m) in kinds,
    )


def without_reentrance(model: nn.Module) -> None:
    checkpoint_layers(model, CheckpointImpl.NO_REENTRANT)


def test_activation_checkpointing_under_fully_shard() -> None:
    expected = train("single")
    for weights, figures in run_ranks(2, train_checkpointed):
        plain = {name.replace("_checkpoint_wrapped_module.", ""): w for name, w in weights.items()}
        assert_equal((plain, figures), expected)


def train_checkpointed() -> Report:
    return train("fsdp", prepare=without_reentrance)


def shard_columns() -> str:
    model = llama()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    return refusal(model)


def shard_a_head_for_tensor_parallelism() -> str:
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    model = llama()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model.lm_head, mesh, RowwiseParallel())
    return refusal(model)


def refusal(model: nn.Module) -> str:
    try:
        safeopt.Guard(model, random_anchors(), **GUARD)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.trap("optimizers 5.4.5")
@pytest.mark.parametrize("work", [shard_columns, shard_a_head_for_tensor_parallelism])
def test_other_placements_are_refused(work: Any) -> None:
    for text in run_ranks(2, work):
        assert "handles fully_shard by rows (dimension 0)" in text


def shard_under_a_passport() -> tuple[str, bool]:
    model = llama()
    before = [p.detach().clone() for p in model.parameters()]
    fully_shard(model)
    guard = PassportGuard(model, {}, uncovered="ignore")
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, guard=guard)
    tokens = torch.randint(0, 97, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    try:
        optimizer.step()
    except ValueError as error:
        now = [p.full_tensor() for p in model.parameters() if isinstance(p, DTensor)]
        return str(error), all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
    return "no error", False


def test_a_passport_refuses_shards() -> None:
    torch.manual_seed(0)
    for text, is_clean in run_ranks(2, shard_under_a_passport):
        assert "a passport does not guard sharded parameters" in text
        assert is_clean
