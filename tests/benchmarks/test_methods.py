from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from benchmarks.collapse.methods import METHODS, Setup
from benchmarks.collapse.methods.base import Displacement, Spending, norm
from benchmarks.collapse.methods.mixed import Mixed, joined
from benchmarks.collapse.methods.random_subspace import RandomSubspace
from safeopt import Anchors
from safeopt.anchors import IGNORED
from tests.benchmarks.conftest import SmallWorld


def setup_of(world: SmallWorld, options: dict[str, Any] | None = None) -> Setup:
    def earlier(method: str, variant: str) -> dict[str, Any]:
        return {"log": {"step_norm": [0.25]}}

    model, anchors = world.model(), world.anchors("style")
    return Setup(model, anchors, world.settings, options or {}, 0, earlier, world.base)


def test_mixed_meets_its_rate(world: SmallWorld) -> None:
    method = Mixed(setup_of(world), anchors_per_step=2.4)
    batches = islice(world.batches("style", 4), 5)
    rows = [method.step(batch)["safety_rows"] for batch in batches]
    assert rows == [2, 2, 3, 2, 3]
    assert method.spent == Spending(task_rows=20, anchor_rows=12)


def test_joined_pads_to_one_length() -> None:
    anchors = Anchors.from_tokens([[1, 2, 3, 4]], [[IGNORED, IGNORED, 3, 4]])
    batch = {
        "input_ids": torch.tensor([[5, 6]]),
        "labels": torch.tensor([[IGNORED, 6]]),
        "attention_mask": torch.ones(1, 2, dtype=torch.int64),
    }
    both = joined(batch, anchors.batch())
    assert both["input_ids"].tolist() == [[5, 6, 0, 0], [1, 2, 3, 4]]
    assert both["labels"].tolist() == [[IGNORED, 6, IGNORED, IGNORED], [IGNORED, IGNORED, 3, 4]]
    assert both["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_norm_matched_steps_have_the_given_norm_and_adamws_direction(world: SmallWorld) -> None:
    batch = next(iter(world.batches("style", 8)))
    steps = {}
    for name in ("adamw", "norm_matched"):
        setup = setup_of(world, {"like": "safe/default"} if name == "norm_matched" else {})
        displacement = Displacement(setup.model)
        displacement.start()
        METHODS[name](setup).step(batch)
        steps[name] = torch.cat([t.flatten() for t in displacement.taken()])
    assert float(steps["norm_matched"].norm()) == pytest.approx(0.25, rel=1e-4)
    assert float(torch.cosine_similarity(*steps.values(), dim=0)) == pytest.approx(1.0, abs=1e-5)


def test_random_subspace_leaves_no_component_in_its_basis(world: SmallWorld) -> None:
    setup = setup_of(world)
    method = RandomSubspace(setup, rank=3, refresh_every=2)
    displacement = Displacement(setup.model)
    displacement.start()
    method.step(next(iter(world.batches("style", 8))))
    step = torch.cat([t.flatten() for t in displacement.taken()])
    assert float((method._basis.T @ step).norm()) < 1e-4 * norm([step])
    assert norm([step]) > 0


def test_schedule_warms_up_and_falls_to_zero(world: SmallWorld) -> None:
    run = world.settings
    rates = [run.rate(step) for step in range(run.steps + 1)]
    assert rates[0] == 0.5
    assert max(rates) == rates[run.warmup_steps - 1] == rates[run.warmup_steps] == 1.0
    assert rates[-1] == 0.0
    assert rates[2:] == sorted(rates[2:], reverse=True)
