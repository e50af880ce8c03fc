from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import safeopt
from safeopt.geometry.moves import next_brake
from tests.zoo import (
    ARCHITECTURES,
    VOCABULARY,
    assert_equal_nested,
    llama,
    lora_llama,
    random_anchors,
    take_training_step,
    trainable,
)


class Uncoverable(nn.Module):
    """A model with a raw parameter that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(input_ids) * self.scale)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    )


# -- refresh leaves everything as it was ----------------------------------------------------------


class WithNoise(nn.Module):
    """Dropout, a buffer that forward writes, and a random draw: all to be left as they were."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.drop, self.fail = nn.Dropout(0.5), fail
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.drop(self.embed(input_ids)) + 0 * torch.rand(8)
        if self.fail:
            raise RuntimeError("failed on purpose")
        return self.head(x)


@pytest.mark.trap("ux 2.2.3")
@pytest.mark.parametrize("fail", [False, True])
def test_refresh_leaves_the_model_as_it_was(fail: bool) -> None:
    model = WithNoise().train()
    model.drop.eval()  # modes may differ between modules
    guard = safeopt.Guard(model, random_anchors())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    calls, rng = model.calls.clone(), torch.get_rng_state()
    python_rng, numpy_rng = random.getstate(), np.random.get_state()[1].tolist()
    model.fail = fail
    if fail:
        with pytest.raises(RuntimeError, match="on purpose"):
            guard.refresh()
    else:
        guard.refresh()
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python_rng
    assert np.random.get_state()[1].tolist() == numpy_rng
    assert torch.equal(model.calls, calls)
    assert (model.training, model.drop.training) == (True, False)
    assert not any(m._forward_hooks for m in model.modules())
    kept = [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True) if b is not None)


# -- bad input: a clear error, nothing changed ----------------------------------------------------


def test_nothing_trains() -> None:
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        safeopt.Guard(llama().requires_grad_(False), random_anchors())


def test_uncovered_parameters_are_named_ignored_or_frozen() -> None:
    with pytest.raises(ValueError, match=r"no rule covers.*'scale'.*uncovered='freeze'"):
        safeopt.Guard(Uncoverable(), random_anchors())
    for choice in ("ignore", "freeze"):
        model = Uncoverable()
        guard = safeopt.Guard(model, random_anchors(), uncovered=choice)
        assert model.scale.requires_grad == (choice == "ignore")
        optimizer = safeopt.SafeAdamW(trainable(model).values(), lr=0.1, guard=guard)
        model(torch.arange(6)[None]).square().sum().backward()
        optimizer.step()
        assert torch.equal(model.scale.detach(), torch.ones(8)) == (choice == "freeze")
        assert guard.sketch is not None
        assert "scale" not in guard.sketch.blocks


def test_anchors_of_another_tokenizer() -> None:
    anchors = safeopt.Anchors.from_tokens([[1, 2, VOCABULARY + 5]], [[-100, 2, 3]])
    with pytest.raises(ValueError, match=r"anchor 0 holds token id 102 .* 97 entries"):
        safeopt.Guard(llama(), anchors)


def test_anchor_longer_than_the_context() -> None:
    anchors = safeopt.Anchors.from_tokens([[1] * 65], [[-100, *[1] * 64]])
    with pytest.raises(ValueError, match=r"anchor 0 has 65 tokens.*context of 64"):
        safeopt.Guard(llama(), anchors)


def test_nan_weights_are_found_at_construction() -> None:
    model = llama()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="anchor loss is not finite"):
        safeopt.Guard(model, random_anchors())


def poison_gradient(model: nn.Module) -> None:
    parameter = list(model.parameters())[3]
    assert parameter.grad is not None
    parameter.grad.view(-1)[0] = float("nan")


def poison_weights(model: nn.Module) -> None:
    with torch.no_grad():
        list(model.parameters())[3].view(-1)[0] = float("inf")


@pytest.mark.parametrize(
    ("poison", "complaint"),
    [
        (poison_gradient, r"gradient of 'model\..*' is not finite"),
        (poison_weights, "anchor loss is not finite"),
    ],
)
def test_nan_leaves_weights_and_state_untouched(
    poison: Callable[[nn.Module], None], complaint: str
) -> None:
    model = llama()
    guard = safeopt.Guard(model, random_anchors(), refresh_every=1)
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, guard=guard)
    take_training_step(model, optimizer)
    x = torch.randint(0, VOCABULARY, (2, 8))
    optimizer.zero_grad()
    model(input_ids=x, labels=x).loss.backward()
    poison(model)
    before = snapshot(model, optimizer)
    with pytest.raises(FloatingPointError, match=complaint):
        optimizer.step()
    assert_equal_nested(before, snapshot(model, optimizer))


def test_guard_of_another_model() -> None:
    guard = safeopt.Guard(llama(), random_anchors())
    with pytest.raises(ValueError, match=r"not in the guard's model; build the guard and"):
        safeopt.SafeAdamW(llama().named_parameters(), guard=guard)


def test_parameters_of_another_model_added_later() -> None:
    model = llama()
    guard = safeopt.Guard(model, random_anchors())
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, guard=guard)
    stranger = nn.Parameter(torch.zeros(3))
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="group 1"):
        optimizer.add_param_group({"params": [("stranger", stranger)]})
    assert_equal_nested(before, snapshot(model, optimizer))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"refresh_every": 0},
        {"anchors_per_refresh": 0},
        {"rank": 0},
        {"compression_rank": -1},
        {"damping": 0.0},
        {"retraction_cap": -1.0},
        {"budget": float("nan")},
        {"reference": "mse"},
        {"uncovered": "eror"},
        {"eigenvalue_floor": 2.0},
        {"retraction_cap": float("nan")},
        {"damping": float("inf")},
        {"step_limit": "none"},
        {"rank": 2.0},
        {"seed": None},
        {"transport": "false"},
        {"tangent": None},
    ],
)
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(setting))} must be "):
        safeopt.Guard(llama(), random_anchors(), **setting)


def test_no_anchors() -> None:
    with pytest.raises(ValueError, match="no anchors: pass at least one"):
        safeopt.Guard(llama(), random_anchors().first(0))


def test_settings_that_a_change_would_not_reach_are_read_only() -> None:
    guard = safeopt.Guard(llama(), random_anchors(), budget=0.1, refresh_every=3)
    expected = {"budget": 0.1, "refresh_every": 3, "anchors_per_refresh": 8}
    for name, value in expected.items():
        with pytest.raises(AttributeError):
            setattr(guard, name, 1)
        assert getattr(guard, name) == value


# -- schedule, thresholds, telemetry, state -------------------------------------------------------


def test_refreshes_come_when_due() -> None:
    model = llama()
    guard = safeopt.Guard(model, random_anchors(), refresh_every=3)
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-3, guard=guard)
    seen, ages = [], []
    for _ in range(7):
        take_training_step(model, optimizer)
        seen.append(guard.sketch)
        ages.append(guard.metrics()["safety/basis_age"])
    assert ages == [1, 2, 3, 1, 2, 3, 1]
    assert [a is b for a, b in pairwise(seen)] == [True, True, False] * 2


def test_without_transport_the_first_sketch_stays_but_losses_are_measured() -> None:
    model = llama()
    guard = safeopt.Guard(model, random_anchors(), refresh_every=2, transport=False)
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, guard=guard)
    take_training_step(model, optimizer)
    first, loss = guard.sketch, guard.metrics()["safety/anchor_loss"]
    for _ in range(4):
        take_training_step(model, optimizer)
    assert guard.sketch is first
    assert guard.metrics()["safety/anchor_loss"] != loss


@pytest.mark.trap("ux 0.11")
def test_a_fresh_adapter_is_refreshed_again_after_its_first_step() -> None:
    model = lora_llama()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()
    guard = safeopt.Guard(model, random_anchors(), refresh_every=10)
    optimizer = safeopt.SafeAdamW(trainable(model).items(), lr=1e-3, guard=guard)
    ages = []
    for _ in range(3):
        take_training_step(model, optimizer)
        ages.append(guard.metrics()["safety/basis_age"])
    assert ages == [1, 1, 2]


@pytest.mark.parametrize("reference", ["nll", "kl"])
def test_thresholds_are_the_aligned_losses_plus_budget(reference: Any) -> None:
    model, anchors = llama().eval(), random_anchors(6)
    guard = safeopt.Guard(model, anchors, budget=0.25, reference=reference, anchors_per_refresh=4)
    aligned = [
        float(model(input_ids=ids[None], labels=labels[None]).loss)
        for ids, labels in zip(anchors.input_ids, anchors.labels, strict=True)
    ]
    expected = torch.tensor(aligned) if reference == "nll" else torch.zeros(6)
    torch.testing.assert_close(guard.thresholds, expected + 0.25, rtol=1e-4, atol=1e-5)


def test_wrappers_are_looked_through() -> None:
    model = llama()
    compiled = torch.compile(model)
    assert safeopt.Guard(compiled, random_anchors()).model is model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_metrics_are_finite_numbers(architecture: str) -> None:
    model = ARCHITECTURES[architecture]()
    guard = safeopt.Guard(model, random_anchors(), budget=-0.1)
    optimizer = safeopt.SafeAdamW(trainable(model).items(), lr=1e-3, guard=guard)
    take_training_step(model, optimizer)
    metrics = guard.metrics()
    assert {"safety/anchor_loss", "safety/violation", "safety/removed_fraction"} <= set(metrics)
    assert {"safety/leak", "safety/basis_age", "safety/step_ms", "safety/refresh_ms"} <= set(
        metrics
    )
    assert all(isinstance(v, float) and np.isfinite(v) for v in metrics.values())
    assert metrics["safety/violation"] > 0
    assert metrics["safety/retraction_ratio"] > 0
    assert bool((guard.spectrum() >= 0).all())


def test_spectrum_needs_a_sketch() -> None:
    with pytest.raises(RuntimeError, match=r"call guard\.refresh"):
        safeopt.Guard(llama(), random_anchors()).spectrum()


@pytest.mark.trap("optimizers 0.14", "optimizers 5.1.22")
@pytest.mark.supports(host="plain loop", feature="resume")
@pytest.mark.parametrize("reference", ["nll", "kl"])
@pytest.mark.parametrize("stop", [2, 3])
def test_resume_is_bit_exact_across_a_refresh(tmp_path: Any, stop: int, reference: Any) -> None:
    anchors = random_anchors(7)
    batches = [torch.randint(0, VOCABULARY, (4, 10)) for _ in range(8)]

    def build(model: nn.Module) -> safeopt.SafeAdamW:
        guard = safeopt.Guard(
            model, anchors, refresh_every=3, anchors_per_refresh=4, budget=0.0, reference=reference
        )
        return safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, guard=guard)

    model = llama()
    start = copy.deepcopy(model)
    optimizer = build(model)
    for batch in batches[:stop]:
        take_training_step(model, optimizer, batch)
    assert optimizer.guard is not None
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "guard": optimizer.guard.state_dict(),
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    for batch in batches[stop:]:
        take_training_step(model, optimizer, batch)

    resumed = start
    again = build(resumed)
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    assert again.guard is not None
    again.guard.load_state_dict(loaded["guard"])
    for batch in batches[stop:]:
        take_training_step(resumed, again, batch)
    assert_equal_nested(dict(model.state_dict()), dict(resumed.state_dict()))


# -- the brake ------------------------------------------------------------------------------------


def test_brake_follows_the_violation() -> None:
    assert next_brake(1.0, violation=0.2, limit=0.05) == pytest.approx(0.5)
    assert next_brake(0.5, violation=0.0, limit=0.05) == pytest.approx(0.65)
    assert next_brake(0.9, violation=0.01, limit=0.05) == 1.0
    assert next_brake(0.2, violation=100.0, limit=0.05) == 0.1


def test_brake_says_when_it_is_at_its_floor_and_does_not_hold() -> None:
    assert next_brake(0.1, violation=0.04, limit=0.05) == pytest.approx(0.1 * math.sqrt(1.25))
    with pytest.warns(UserWarning, match="step_limit=None"):
        assert next_brake(0.1, violation=0.06, limit=0.05) == 0.1


def test_brake_shortens_steps_and_leaves_the_learning_rate_alone() -> None:
    lengths = {}
    for limit in (None, 1e-4):
        model = llama()
        guard = safeopt.Guard(
            model, random_anchors(), budget=-1.0, step_limit=limit, tangent=False, retraction=False
        )
        optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-3, guard=guard)
        before = [p.detach().clone() for p in model.parameters()]
        take_training_step(model, optimizer)
        moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
        lengths[limit] = float(torch.cat([m.flatten() for m in moved]).norm())
        assert optimizer.param_groups[0]["lr"] == 1e-3
    assert guard.metrics()["safety/brake"] == 0.1
    assert lengths[1e-4] == pytest.approx(0.1 * lengths[None], rel=1e-2)
