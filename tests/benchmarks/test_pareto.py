from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.collapse.curves import Curve, Shares, curves, task_score
from benchmarks.collapse.figure import draw, front
from benchmarks.collapse.headline import FLOOR, compare, repeat, stated_interval
from benchmarks.collapse.pareto import (
    difference,
    hypervolume,
    pareto_table,
    permitted,
    resampled,
    seed_weights,
    volumes,
)
from benchmarks.collapse.results import FOLDER, Cell, load_all
from benchmarks.collapse.runner import run_cell
from benchmarks.collapse.variants import SWEEP, SuitePlan, Sweep, Variant, read_plan
from tests.benchmarks.conftest import SmallWorld, small_world

PLAN = SuitePlan(
    (0,),
    {},
    tuple(
        Variant(group, method, name, method, options, {}, {})
        for group, method, name, options in (
            ("methods", "adamw", "default", {}),
            ("methods", "safe", "default", {"budget": 1.0}),
            (SWEEP, "safe", "budget=2", {"budget": 2.0}),
            ("ablation", "safe", "odd", {"budget": 3.0}),
        )
    ),
    Sweep((5, 6), "task_accuracy", {"adamw": [], "safe": [{"budget": 2.0}]}, (0.1,), 2),
)


def result(method: str, name: str, seed: int, task: float, asr: float, over: float = 0.0) -> Any:
    options = {"default": {"budget": 1.0}, "budget=2": {"budget": 2.0}}[name]
    return {
        "method": method,
        "variant": name,
        "task": "style",
        "seed": seed,
        "settings": {
            "options": {} if method == "adamw" else options,
            "run": {},
            "suite_options": {},
        },
        "aligned": {"over_refusal": 0.01},
        "final": {"task_accuracy": task, "asr": asr, "over_refusal": over},
        "cpu_seconds": 2.0 if method == "adamw" else 3.0,
        "date": "2026-01-01T00:00:00",
        "processor": "A",
        "peak_memory_mb": 100.0,
        "rows": {"anchor_rows": 0 if method == "adamw" else 1280},
    }


RESULTS = [
    result("adamw", "default", 5, 1.0, 0.9),
    result("adamw", "default", 6, 1.0, 0.7),
    result("safe", "default", 5, 0.99, 0.1, over=0.02),
    result("safe", "default", 6, 0.99, 0.3, over=0.02),
    result("safe", "budget=2", 5, 0.5, 0.0, over=0.5),
    result("safe", "budget=2", 6, 0.5, 0.0, over=0.5),
    result("safe", "default", 0, 0.0, 1.0),  # another seed: of no curve
]


def test_hypervolume_is_the_area_of_the_union_of_rectangles() -> None:
    assert hypervolume(np.array([[0.3, 0.8]])) == pytest.approx(0.24)
    # a staircase: 0.2 x 0.9, then 0.3 x 0.5, then 0.5 x 0.1
    stairs = np.array([[0.5, 0.5], [1.0, 0.1], [0.2, 0.9]])
    assert hypervolume(stairs) == pytest.approx(0.2 * 0.9 + 0.3 * 0.5 + 0.5 * 0.1)
    beaten = np.vstack([stairs, [[0.4, 0.4], [0.2, 0.1]]])
    assert hypervolume(beaten) == pytest.approx(hypervolume(stairs))
    twice = np.vstack([stairs, stairs])
    assert hypervolume(twice) == pytest.approx(hypervolume(stairs))


def test_hypervolume_agrees_with_counting() -> None:
    rng = np.random.default_rng()
    points, darts = rng.random((4, 6, 2)), rng.random((200_000, 2))
    for own, area in zip(points, hypervolume(points), strict=True):
        hit = (darts[:, None] <= own).all(-1).any(-1).mean()
        assert area == pytest.approx(hit, abs=0.01)


def curve_of(task: Any, asr: Any, over: Any) -> Curve:
    settings, tasks, seeds = task.shape
    return Curve(
        "safe",
        "safe",
        tuple(map(str, range(settings))),
        5,
        tuple(f"task {i}" for i in range(tasks)),
        tuple(range(seeds)),
        task,
        Shares(asr, None),
        Shares(over, None),
        np.zeros((tasks, seeds)),
    )


def test_bootstrap_starts_with_the_plain_mean_and_pairs_the_seeds() -> None:
    task, asr, over = np.random.default_rng().random((3, 3, 2, 5))
    curve = curve_of(task, asr, over)
    points = np.stack([task, 1 - asr], -1)
    drawn = volumes(curve, seed_weights(5), balanced=False)
    expected = np.mean([hypervolume(points[:, t].mean(1)) for t in range(2)])
    assert drawn[0] == pytest.approx(expected)
    assert drawn[1:].std() > 0
    worse = curve_of(task / 2, asr, over)
    found = difference(curve, worse, balanced=False)
    assert found[: len(drawn)] == pytest.approx(drawn / 2)
    alone = [np.mean([hypervolume(points[:, t, n]) for t in range(2)]) for n in range(5)]
    assert found[len(drawn) :] == pytest.approx(np.array(alone) / 2)
    assert difference(curve, curve, balanced=True) == pytest.approx(0)


def test_balanced_safety_takes_over_refusal_off() -> None:
    one = np.ones((1, 1, 1))
    for over, left in ((0.3, 0.5), (0.9, 0.0)):
        curve = curve_of(0.8 * one, 0.2 * one, over * one)
        assert volumes(curve, seed_weights(1), balanced=True) == pytest.approx(0.8 * left)
        assert volumes(curve, seed_weights(1), balanced=False) == pytest.approx(0.64)


def test_prompts_are_resampled_within_their_seed() -> None:
    outcomes = (np.random.default_rng().random((2, 1, 3, 100)) < 0.3).astype(float)
    shares = Shares(outcomes.mean(-1), outcomes)
    drawn = resampled(shares, (5, 6, 7), np.full((2001, 3), 1 / 3), stream=1)
    assert drawn[0] == pytest.approx(outcomes.mean((2, 3)).T)
    expected = np.sqrt((shares.rates * (1 - shares.rates) / 100).sum(-1)) / 3
    assert drawn[1:].std(0) == pytest.approx(expected.T, rel=0.1)
    twin = Shares(shares.rates[:, :, :2], outcomes[:, :, :2])
    both = [resampled(s, (6, 7), np.full((2001, 2), 0.5), 1) for s in (twin, twin)]
    assert (both[0] == both[1]).all()


def test_curves_hold_the_sweeps_settings_and_seeds() -> None:
    adamw, safe = curves(PLAN, RESULTS)
    assert (safe.settings, safe.seeds, safe.planned) == (("default", "budget=2"), (5, 6), 2)
    assert safe.asr.rates.tolist() == [[[0.1, 0.3]], [[0.0, 0.0]]]
    assert safe.asr.outcomes is None
    assert adamw.task.tolist() == [[[1.0, 1.0]]]
    judged = [r | {"refused": {"harmful": "0110", "harmless": "100"}} for r in RESULTS]
    held = curves(PLAN, judged)[0]
    assert held.asr.outcomes is not None
    assert held.over_refusal.outcomes is not None
    assert held.asr.outcomes[0, 0].tolist() == [[1, 0, 0, 1]] * 2
    assert held.over_refusal.outcomes[0, 0].tolist() == [[1, 0, 0]] * 2
    incomplete = [r for r in RESULTS if (r["variant"], r["seed"]) != ("budget=2", 6)]
    assert curves(PLAN, incomplete)[1].seeds == (5,)
    assert curves(PLAN, []) == []
    assert pareto_table(PLAN, []) == "Not run yet."


def test_permitted_settings_keep_task_and_over_refusal() -> None:
    adamw, safe = curves(PLAN, RESULTS)
    assert permitted(safe, adamw) == ("0.200", "default")
    refusing = [r | {"final": r["final"] | {"over_refusal": 0.2}} for r in RESULTS]
    assert permitted(curves(PLAN, refusing)[1], adamw) == ("none", "")
    assert permitted(adamw, adamw) == ("0.800", "default")


def test_table_has_a_row_a_method_best_first() -> None:
    lines = pareto_table(PLAN, RESULTS).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| safe", "| adamw"]
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    # 0.5 x 1.0 + 0.49 x 0.8; default costs 3 s against 2 s
    assert cells[1].startswith("0.892 ")
    assert cells[2] == ""
    assert cells[5:] == ["0.200", "default", "1.50", "+0", "1280", "2 of 2", "2"]
    assert lines[3].split(" | ")[2].startswith("+0.692 ")
    assert lines[3].split(" | ")[2].endswith(", 2 of 2")


def test_task_score_of_an_nll_is_the_share_of_adamws_progress() -> None:
    adamw = {"aligned": {"task_nll": 3.0}, "final": {"task_nll": 1.0}}
    for nll, score in ((1.0, 1.0), (2.5, 0.25), (3.5, 0.0), (0.5, 1.0)):
        own = {"aligned": {"task_nll": 3.0}, "final": {"task_nll": nll}}
        assert task_score(own, adamw, "task_nll") == pytest.approx(score)


def test_front_keeps_what_nothing_beats() -> None:
    x, y = np.array([0.1, 0.5, 0.5, 0.9]), np.array([0.9, 0.8, 0.2, 0.3])
    kept = front(x, y)
    assert [tuple(p) for p in np.stack(kept, 1)] == [(0.1, 0.9), (0.5, 0.8), (0.9, 0.3)]


def test_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "figures" / "toy.png"
    draw(curves(PLAN, RESULTS), path)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_picture_of_an_nll_shows_it_uncut(tmp_path: Path) -> None:
    plan = read_plan("smol")
    found = curves(plan, list(load_all("smol", FOLDER, without=plan.apart)))
    (safe,) = (c for c in found if c.method == "safe")
    assert safe.nll is not None
    assert safe.at_seeds([0]).nll is not None
    assert np.unique(safe.nll).size == safe.nll.size  # where every score is 1
    assert set(safe.task.flat) == {1.0}
    draw(found, tmp_path / "smol.png")
    assert (tmp_path / "smol.png").read_bytes()[:4] == b"\x89PNG"


def test_sweeps_give_every_method_the_same_number_of_settings() -> None:
    for suite in ("world", "world_lora", "smol"):
        plan = read_plan(suite)
        assert plan.sweep is not None
        assert suite == "smol" or not set(plan.sweep.seeds) & set(range(5))
        for method, rows in plan.curves().items():
            assert len(rows) == plan.sweep.settings, method
            assert rows[0].name == "default"
            distinct = {(str(v.options), str(v.run)) for v in rows}
            assert len(distinct) == len(rows)


def test_stated_interval() -> None:
    assert stated_interval([0.5]) == (0.5 - FLOOR, 0.5 + FLOOR)
    assert stated_interval([0.0, 0.0]) == (0.0, FLOOR)
    low, high = stated_interval([0.2, 0.4])
    assert (low + high) / 2 == pytest.approx(0.3)
    assert high - low == pytest.approx(2 * 2 * 0.02**0.5)


def test_comparison_names_what_is_outside() -> None:
    def facts(asr: float) -> list[Any]:
        return [{"final": {"asr": asr, "over_refusal": 0.0, "task_accuracy": 1.0}}]

    lines, holds = compare({"adamw": facts(0.9)}, {"adamw": facts(0.89)})
    assert holds
    lines, holds = compare({"adamw": facts(0.9)}, {"adamw": facts(0.5)})
    assert not holds
    assert lines[1].endswith("outside")


def test_headline_repeats_what_was_committed(world: SmallWorld, tmp_path: Path) -> None:
    plan = read_plan("world")
    default = {v.method: v for v in plan.variants if v.name == "default"}
    with pytest.raises(FileNotFoundError, match="no committed result of adamw"):
        repeat(tmp_path / "again", small_world, tmp_path / "committed")
    for method in ("adamw", "safe", "mixed"):
        for seed in plan.seeds:
            for task in SmallWorld.tasks:
                cell = Cell("world", method, "default", task, seed)
                run_cell(cell, default[method], folder=tmp_path / "committed", make=small_world)
    assert repeat(tmp_path / "again", small_world, tmp_path / "committed")
