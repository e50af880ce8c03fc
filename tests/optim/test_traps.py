"""Traps of guarded optimizers that no other file holds; docs/traps.md lists them all."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

import safeopt
from safeopt.geometry import DenseSubspace
from tests.zoo import VOCABULARY, llama, random_anchors, take_training_step, trainable

ROOT = Path(__file__).parents[2]


def exact_guard(model: nn.Module, **options: Any) -> safeopt.Guard:
    rest = {"compression_rank": None, "retraction": False, "refresh_every": 10**6, **options}
    return safeopt.Guard(model, random_anchors(), **rest)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable(model).items()}


def change(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach() - before[name] for name, p in trainable(model).items()}


def length(step: dict[str, Tensor]) -> float:
    return sum(float(delta.double().square().sum()) for delta in step.values()) ** 0.5


@pytest.mark.trap("optimizers 0.1")
def test_projecting_the_gradient_would_leak_and_projecting_the_step_does_not() -> None:
    base, batch = llama(), torch.randint(0, VOCABULARY, (4, 10))
    guarded = copy.deepcopy(base)
    guard = exact_guard(guarded)
    take_training_step(
        guarded, safeopt.SafeAdamW(guarded.named_parameters(), lr=1e-3, guard=guard), batch
    )
    assert guard.sketch is not None
    start = snapshot(base)
    dense = DenseSubspace.from_sketch(guard.sketch, {n: p.shape for n, p in start.items()})
    basis = dense.basis()
    optimizer = torch.optim.AdamW(base.named_parameters(), lr=1e-3)
    base(input_ids=batch, labels=batch).loss.backward()
    flat = torch.cat([trainable(base)[n].grad.flatten().double() for n in dense.gradients])
    flat -= basis @ (basis.T @ flat)
    for name in dense.gradients:
        p = trainable(base)[name]
        part, flat = flat[: p.numel()], flat[p.numel() :]
        p.grad.copy_(part.view_as(p))
    optimizer.step()
    assert dense.leak(change(guarded, start), basis) < 1e-5
    assert dense.leak(change(base, start), basis) > 1e-2


@pytest.mark.trap("optimizers 5.1.14", "ux 2.3.6")
@pytest.mark.parametrize("limit", [0.1, None])
@pytest.mark.parametrize("seed", range(3))
def test_tangent_never_lengthens_a_step_and_the_clipped_gradient_is_what_it_sees(
    seed: int, limit: float | None
) -> None:
    torch.manual_seed(seed)
    base, batch = llama(), torch.randint(0, VOCABULARY, (4, 10))
    lengths, gradients = [], []
    for is_guarded in (True, False):
        model = copy.deepcopy(base)
        torch.manual_seed(seed)
        guard = exact_guard(model) if is_guarded else None
        optimizer = safeopt.SafeSGD(model.named_parameters(), lr=0.1, guard=guard)
        model(input_ids=batch, labels=batch).loss.backward()
        if limit is not None:
            nn.utils.clip_grad_norm_(model.parameters(), limit)
        before = snapshot(model)
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        for p, gradient in zip(model.parameters(), gradients[-1], strict=True):
            assert torch.equal(p.grad, gradient)
        lengths.append(length(change(model, before)))
    assert lengths[0] <= lengths[1] * (1 + 1e-6)
    if limit is not None:
        assert lengths[1] == pytest.approx(0.1 * limit, rel=1e-3)


@pytest.mark.trap("optimizers 5.1.3", "ux 2.3.5")
def test_one_projection_spans_all_groups() -> None:
    base, anchors = llama(), random_anchors()
    batches = [torch.randint(0, VOCABULARY, (4, 10)) for _ in range(4)]
    ends = []
    for size in (1000, 4):
        model = copy.deepcopy(base)
        guard = safeopt.Guard(model, anchors, budget=-0.1, refresh_every=2)
        named = list(trainable(model).items())
        groups = [{"params": named[i : i + size]} for i in range(0, len(named), size)]
        optimizer = safeopt.SafeAdamW(groups, lr=1e-3, eps=1e-4, guard=guard)
        found = [name for group in optimizer.param_groups for name in group["param_names"]]
        assert found == [name for name, _ in named]
        for batch in batches:
            take_training_step(model, optimizer, batch)
        ends.append(snapshot(model))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


class Odd(nn.Module):
    """An embedding whose gradient may be sparse."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8, sparse=sparse)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


@pytest.mark.trap("optimizers 5.1.5")
@pytest.mark.parametrize("kind", [safeopt.SafeAdamW, safeopt.SafeSGD])
def test_sparse_gradients_are_refused_before_anything_has_changed(kind: Any) -> None:
    model = Odd(sparse=True)
    optimizer = kind(model.parameters(), guard=safeopt.Guard(model, random_anchors()))
    model(torch.randint(0, VOCABULARY, (2, 5))).sum().backward()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'embed\.weight' is sparse.*sparse=False"):
        optimizer.step()
    torch.testing.assert_close(snapshot(model), before, rtol=0, atol=0)
    assert not optimizer.state


@pytest.mark.trap("optimizers 5.1.5")
def test_gradients_that_are_none_or_zero() -> None:
    model = Odd(sparse=False)
    guard = exact_guard(model, tangent=False)
    optimizer = safeopt.SafeAdamW(model.parameters(), lr=0.1, weight_decay=0.0, guard=guard)
    model(torch.randint(0, VOCABULARY, (2, 5))).sum().backward()
    model.embed.weight.grad.zero_()
    model.head.bias.grad = None
    before = snapshot(model)
    optimizer.step()
    moved = {name for name, delta in change(model, before).items() if bool(delta.any())}
    assert moved == {"head.weight"}
    assert model.head.bias not in optimizer.state
    assert optimizer.state[model.embed.weight].keys() == {"exp_avg", "exp_avg_sq", "step"}


@pytest.mark.trap("optimizers 5.1.16")
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_cosine_to_zero_ends_in_steps_that_move_nothing(as_tensor: bool) -> None:
    model = llama()
    guard = safeopt.Guard(model, random_anchors(), budget=-0.5, refresh_every=2)
    optimizer = safeopt.SafeAdamW(
        model.named_parameters(), lr=torch.tensor(1e-3) if as_tensor else 1e-3, guard=guard
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4, eta_min=0.0)
    rates, moves = [], []
    for _ in range(5):
        before = snapshot(model)
        rates.append(float(optimizer.param_groups[0]["lr"]))
        take_training_step(model, optimizer)
        scheduler.step()
        moves.append(length(change(model, before)))
    assert rates[4] == pytest.approx(0, abs=1e-12)
    assert min(moves[:4]) > 1e-3 > 1e-6 > moves[4]


@pytest.mark.trap("ux 0.8", "ux 2.2.5")
@pytest.mark.parametrize("kind", [safeopt.SafeAdamW, safeopt.SafeSGD, safeopt.SafeMuon])
def test_no_closure_is_needed_and_there_are_no_modes(kind: Any) -> None:
    model = llama()
    optimizer = kind(model.named_parameters(), guard=safeopt.Guard(model, random_anchors()))
    take_training_step(model, optimizer)  # steps without a closure
    # Hosts switch modes of optimizers that have any, and not every host does so both ways.
    assert not hasattr(optimizer, "train")
    assert not hasattr(optimizer, "eval")
    assert inspect.signature(kind.step).parameters["closure"].default is None


@pytest.mark.trap("ux 0.2")
def test_accelerate_still_drops_fsdp2_on_a_cpu() -> None:
    """If this fails, recipes/accelerate/fsdp2.yaml can be tested without a GPU."""
    PartialState._reset_state()
    AcceleratorState._reset_state()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.distributed_type == DistributedType.NO
    assert type(accelerator.prepare(llama())).__name__ == "LlamaForCausalLM"


@pytest.mark.trap("optimizers 0.18")
def test_no_kernel_that_writes_in_place_is_tuned_by_running_it() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "triton.autotune" not in path.read_text(encoding="utf-8"), path
