"""bf16 and fp16 weights: rounding, Kahan's compensation, fp32 moments."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safeopt
from safeopt.geometry import DenseSubspace
from safeopt.optim import reference
from tests.zoo import llama, random_anchors, take_training_step, trainable

FP32 = torch.float32
BF16 = torch.bfloat16


def parameter(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def run(optimizer: torch.optim.Optimizer, p: Tensor, gradients: list[Tensor]) -> Tensor:
    for gradient in gradients:
        p.grad = gradient.to(p.dtype)
        optimizer.step()
    return p.detach().clone()


def copies(p: Tensor) -> tuple[Tensor, Tensor]:
    """Two equal parameters: one as it is, one in fp32."""
    return p.detach().clone().requires_grad_(), p.detach().float().requires_grad_()


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 5), (3,), (), (0, 3), (5, 4, 3)])
def test_kahan_follows_fp32(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    narrow, wide = copies(parameter(dtype, *shape))
    options: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.1}
    ours = safeopt.SafeAdamW([narrow], **options, rounding="kahan", moments_dtype=FP32)
    plain = torch.optim.AdamW([wide], **options)
    gradients = [torch.randn(shape).to(dtype).float() for _ in range(50)]
    moved, truth = run(ours, narrow, gradients), run(plain, wide, gradients)
    ulp = torch.finfo(dtype).eps * truth.abs()
    # What is owed is stored in the same dtype, to half of its smallest number, at every step.
    owed = len(gradients) * torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert bool(((moved.float() - truth).abs() <= 0.51 * ulp + owed + 1e-9).all())
    if moved.numel():
        assert ours.state[narrow]["compensation"].dtype == dtype
        assert ours.state[narrow]["exp_avg"].dtype == FP32


@pytest.mark.trap("optimizers 5.1.15")
def test_stochastic_rounding_is_right_on_average_and_nearest_is_not() -> None:
    start = torch.full((400, 250), 1.0, dtype=BF16)
    ends = {}
    for rounding in ("nearest", "stochastic"):
        p = start.clone().requires_grad_()
        optimizer = safeopt.SafeAdamW(
            [p], lr=1e-4, weight_decay=0.0, rounding=rounding, moments_dtype=FP32
        )
        ends[rounding] = run(optimizer, p, [torch.ones(400, 250)] * 10)
    assert torch.equal(ends["nearest"], start)  # a step is a fortieth of the gap between weights
    mean = float((ends["stochastic"].double() - 1).mean())
    assert mean == pytest.approx(-1e-3, rel=0.05)


@pytest.mark.trap("optimizers 5.1.15")
def test_stochastic_rounding_repeats_and_hangs_on_its_seed() -> None:
    p, gradients = parameter(BF16, 20, 30), [torch.randn(20, 30) for _ in range(4)]

    def end(seed: int) -> Tensor:
        q = p.detach().clone().requires_grad_()
        options: dict[str, Any] = {"rounding": "stochastic", "moments_dtype": FP32, "seed": seed}
        before = torch.get_rng_state()
        moved = run(safeopt.SafeAdamW([q], lr=1e-3, **options), q, gradients)
        assert torch.equal(before, torch.get_rng_state())
        return moved

    assert torch.equal(end(1), end(1))
    assert not torch.equal(end(1), end(2))


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"amsgrad": True}])
def test_fp32_moments_are_those_of_fp32_weights(options: dict[str, Any]) -> None:
    narrow, wide = copies(parameter(BF16, 6, 4))
    ours = safeopt.SafeAdamW([narrow], lr=1e-3, moments_dtype=FP32, **options)
    gradients = [torch.randn(6, 4).bfloat16().float() for _ in range(5)]
    run(ours, narrow, gradients)
    plain = torch.optim.AdamW([wide], lr=1e-3, **options)
    run(plain, wide, gradients)
    assert ours.state[narrow].keys() == plain.state[wide].keys()
    for key in ours.state[narrow]:
        assert torch.equal(ours.state[narrow][key], plain.state[wide][key])


def test_fp32_weights_are_left_alone() -> None:
    ours, theirs = copies(parameter(FP32, 6, 4))
    gradients = [torch.randn(6, 4) for _ in range(3)]
    first = safeopt.SafeAdamW([ours], rounding="stochastic", moments_dtype=FP32)
    moved = run(first, ours, gradients)
    assert torch.equal(moved, run(torch.optim.AdamW([theirs]), theirs, gradients))


@pytest.mark.trap("optimizers 0.10", "optimizers 5.1.7")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_trap_10_load_state_dict_casts_state_to_the_dtype_of_the_weights(rounding: Any) -> None:
    """research: fp32 moments silently become bf16 on resume."""
    p, gradients = parameter(BF16, 8, 8), [torch.randn(8, 8) for _ in range(6)]
    options: dict[str, Any] = {"lr": 1e-2, "rounding": rounding, "moments_dtype": FP32}
    first = safeopt.SafeAdamW([p], **options)
    run(first, p, gradients[:3])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    q = p.detach().clone().requires_grad_()
    second = safeopt.SafeAdamW([q], **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.state[q]["exp_avg_sq"].dtype == FP32
    assert torch.equal(run(first, p, gradients[3:]), run(second, q, gradients[3:]))
    third = pickle.loads(pickle.dumps(second))
    (r,) = third.param_groups[0]["params"]
    assert torch.equal(run(second, q, gradients), run(third, r, gradients))


@pytest.mark.trap("optimizers 0.10")
def test_trap_10_is_there_in_torch() -> None:
    """If this fails, torch keeps the dtype by itself and `restore_moments` can go."""
    p = parameter(BF16, 2, 2)
    optimizer = torch.optim.AdamW([p])
    run(optimizer, p, [torch.ones(2, 2)])
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].float()
    optimizer.load_state_dict(state)
    assert optimizer.state[p]["exp_avg"].dtype == BF16


def bf16_model() -> nn.Module:
    return llama(hidden_size=48, intermediate_size=64).bfloat16()


def leak_after(rounding: Any, steps: int, lr: float) -> float:
    """Leak of what the stored weights have moved under one sketch, since the first step."""
    torch.manual_seed(3)
    model, anchors = bf16_model(), random_anchors()
    guard = safeopt.Guard(
        model, anchors, compression_rank=None, refresh_every=10**6, retraction=False
    )
    optimizer = safeopt.SafeAdamW(
        model.named_parameters(), lr=lr, rounding=rounding, moments_dtype=FP32, guard=guard
    )
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    for _ in range(steps):
        take_training_step(model, optimizer)
    assert guard.sketch is not None
    shapes = {name: p.shape for name, p in start.items()}
    dense = DenseSubspace.from_sketch(guard.sketch, shapes)
    change = {n: p.detach().float() - start[n].float() for n, p in trainable(model).items()}
    return dense.leak(change, dense.basis())


@pytest.mark.trap("optimizers 0.2")
def test_better_rounding_leaks_less() -> None:
    leaks = {rounding: leak_after(rounding, 20, 1e-4) for rounding in ("nearest", "kahan")}
    leaks["stochastic"] = leak_after("stochastic", 20, 1e-4)
    assert leaks["kahan"] < 0.5 * leaks["nearest"]
    assert leaks["stochastic"] < leaks["nearest"]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_guarded_narrow_steps_in_small_chunks_are_the_same(
    rounding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, anchors, x = bf16_model(), random_anchors(), torch.randint(0, 97, (4, 10))
    ends = []
    for size in (1 << 20, 1000):
        monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", size)
        model = copy.deepcopy(base)
        guard = safeopt.Guard(model, anchors, refresh_every=2)
        optimizer = safeopt.SafeAdamW(
            model.named_parameters(), lr=1e-3, rounding=rounding, moments_dtype=FP32, guard=guard
        )
        for _ in range(3):
            take_training_step(model, optimizer, x)
        assert set(optimizer.state) == set(model.parameters())
        ends.append(list(model.parameters()))
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=1e-4)


@pytest.mark.trap("optimizers 0.13")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_a_parameter_without_gradient_is_corrected_and_gets_no_state(rounding: Any) -> None:
    """torch's checkpoints and AdamW's own step break on a state that lacks ``step``."""
    model = bf16_model()
    guard = safeopt.Guard(model, random_anchors(), refresh_every=2, budget=-0.5)
    optimizer = safeopt.SafeAdamW(
        model.named_parameters(), lr=1e-2, rounding=rounding, moments_dtype=FP32, guard=guard
    )
    dead = model.model.layers[0].mlp.up_proj.weight
    start = dead.detach().clone()
    for step in range(5):
        batch = torch.randint(0, 97, (4, 10))
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        if step < 3:
            dead.grad = None
        optimizer.step()
        if step == 2:
            assert not torch.equal(dead, start)
            assert dead not in optimizer.state
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert int(optimizer.state[dead]["step"]) == 2


@pytest.mark.trap("optimizers 0.2", "optimizers 5.1.23")
def test_the_stored_leak_is_reported() -> None:
    model = bf16_model()
    guard = safeopt.Guard(model, random_anchors(), retraction=False)
    optimizer = safeopt.SafeAdamW(
        model.named_parameters(), lr=1e-5, rounding="stochastic", moments_dtype=FP32, guard=guard
    )
    take_training_step(model, optimizer)
    assert guard.metrics()["safety/leak"] > 1e-4  # bf16 cannot hold a step that fp32 can


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, "rounding must be one of"),
        ({"moments_dtype": torch.float64}, "moments_dtype must be None"),
        ({"moments_dtype": FP32, "differentiable": True}, "differentiable=True needs"),
        ({"rounding": "stochastic"}, "pass rounding='kahan'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        safeopt.SafeAdamW([parameter(torch.float16, 2, 2)], **options)
    optimizer = safeopt.SafeAdamW([parameter(BF16, 2, 2)], rounding="stochastic")
    with pytest.raises(ValueError, match="float16"):
        optimizer.add_param_group({"params": [parameter(torch.float16, 2, 2)]})
    assert len(optimizer.param_groups) == 1
