"""The measured theory: the fit, the flows on a toy, and what the committed files say."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.collapse.methods.second_order import elastic_weights
from benchmarks.collapse.results import Cell, load
from benchmarks.theory import report
from benchmarks.theory.fit import interval, slope, time_slope
from benchmarks.theory.flows import checkpoints, drift
from benchmarks.theory.model import TASKS
from benchmarks.theory.toy import Toy
from safeopt.geometry.moves import Eigenbasis


def committed(name: str) -> dict[str, Any]:
    path = report.HERE / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_slope_of_a_power_law() -> None:
    xs = [0.1 * 1.3**i for i in range(12)]
    assert slope(xs, [2.5 * x**3.7 for x in xs]) == pytest.approx(3.7)


def test_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    half = 2.571 * torch.tensor([1.0, 2, 3, 4, 5, 6]).std().item() / 6**0.5
    assert found["mean"] == 3.5
    assert found["high"] - 3.5 == pytest.approx(half, rel=1e-6)


def test_checkpoints_end_at_the_last_step() -> None:
    steps = list(checkpoints(100))
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (2, 100) or steps[0] == 1


@pytest.mark.parametrize(("options", "period", "exponent"), [
    ({}, None, 4), ({"overlap": 0.4}, None, 2), ({}, 256, 4), ({"overlap": 0.4}, 256, 4),
    ({"overlap": 0.4}, 4, 2),
])  # fmt: skip
def test_exponents_of_a_fresh_toy(options: Any, period: int | None, exponent: int) -> None:
    toy = Toy(int(torch.randint(2**31, ())), **options)
    found = drift(toy, period, step=2e-4, steps=256)
    run = {"times": found.times, "values": found.values, "period": period, "step": 2e-4}
    measured = time_slope(run)
    assert measured is not None
    assert abs(measured - exponent) <= 0.3
    assert found.overlap == pytest.approx(options.get("overlap", 0.0), abs=1e-9)
    if period == 256:
        assert found.predicted * found.times[-1] ** 4 == pytest.approx(found.values[-1], rel=0.2)


def test_a_flat_level_set_does_not_drift_under_a_frozen_projector() -> None:
    found = drift(Toy(1, curved=False), 64, step=1e-3, steps=64)
    assert found.values[-1] < 1e-25


def test_elastic_step_spends_its_budget_on_the_flat_directions() -> None:
    g = torch.randn(6, 40, dtype=torch.float64) * torch.logspace(0, -2, 6)[:, None]
    basis, step = Eigenbasis.of(g @ g.T, None, 1e-12), torch.randn(40, dtype=torch.float64)
    full = 0.5 * float((g @ step).square().mean())
    for share in (0.5, 0.01):
        kept = step - g.T @ elastic_weights(basis, g @ step, share * full)
        assert 0.5 * float((g @ kept).square().mean()) == pytest.approx(share * full, rel=1e-6)
    assert not elastic_weights(basis, g @ step, 2 * full).any()
    u = g.T @ basis.vectors / basis.values.sqrt()
    left = (u.T @ kept) / (u.T @ step)
    assert bool((left.diff() >= -1e-9).all())  # sharp directions lose the largest share


def test_committed_slopes_are_as_predicted() -> None:
    toy, world = committed("toy")["summary"], committed("world")["summary"]["world"]
    assert abs(toy["orthogonal"]["time"]["none"]["mean"] - 4) <= 0.1
    assert abs(toy["overlapping"]["time"]["none"]["mean"] - 2) <= 0.1
    assert toy["flat"]["time"]["frozen"] is None
    for case in ("orthogonal", "overlapping"):
        assert abs(toy[case]["time"]["frozen"]["mean"] - 4) <= 0.1
        assert abs(toy[case]["period"]["mean"] - 2) <= 0.02
    assert world["period"]["low"] <= 2 <= world["period"]["high"]


def test_the_page_shows_the_files() -> None:
    page = (Path(report.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert report.slopes_table([committed("toy"), committed("world")]) in page
    assert report.schedules_table() in page


def test_adaptive_refresh_needs_fewer_passes_at_the_same_figures() -> None:
    spent = {"adaptive": 0.0, "default": 0.0}
    for task, seed in itertools.product(TASKS, range(3)):
        adaptive, fixed = (load(Cell("world", "safe", v, task, seed)) for v in spent)
        assert adaptive is not None
        assert fixed is not None
        spent["adaptive"] += report.anchor_passes(adaptive)
        spent["default"] += report.anchor_passes(fixed)
        one, other = adaptive["final"], fixed["final"]
        assert one["asr"] <= other["asr"] + 0.03
        assert one["over_refusal"] <= other["over_refusal"] + 0.03
        assert one["task_accuracy"] >= other["task_accuracy"] - 0.01
        assert one["task_nll"] <= other["task_nll"] + 0.01
    assert spent["adaptive"] <= 0.6 * spent["default"]
