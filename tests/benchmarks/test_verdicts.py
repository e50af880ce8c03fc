"""Verdicts on H1 to H7, on made-up results whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.collapse.variants import SuitePlan, Sweep, Variant
from benchmarks.collapse.verdicts import HYPOTHESES, verdict_table

ROWS = ("adamw/default", "safe/default", "mixed/default", "norm_matched/default", "null_space/gpm")
SEEDS = (5, 6, 7, 8, 9)
PLAN = SuitePlan(
    SEEDS,
    {},
    tuple(Variant("methods", *row.split("/"), row, {}, {}, {}) for row in ROWS),
    Sweep(SEEDS, "task_accuracy", {"adamw": [], "safe": [], "mixed": []}, (), 1),
    final_seeds=SEEDS,
)
GOOD = {
    "adamw/default": (1.0, 0.9),
    "safe/default": (1.0, 0.0),
    "mixed/default": (1.0, 0.1),
    "norm_matched/default": (1.0, 0.8),
    "null_space/gpm": (0.5, 0.0),
}


def results(figures: dict[str, tuple[float, float]], over: float = 0.0) -> list[Any]:
    return [
        result(name, seed, task, asr, over if name.startswith("safe") else 0.0)
        for name, (task, asr) in figures.items()
        for seed in SEEDS
    ]


def result(name: str, seed: int, task: float, asr: float, over: float) -> dict[str, Any]:
    method, variant = name.split("/")
    return {
        "method": method,
        "variant": variant,
        "task": "style",
        "seed": seed,
        "settings": {"options": {}, "run": {}, "suite_options": {}},
        "aligned": {"asr": 0.0, "over_refusal": 0.0},
        "final": {"task_accuracy": task, "asr": asr, "over_refusal": over},
        "cpu_seconds": 1.2 if method == "safe" else 1.0,
        "date": "2026-01-01T00:00:00",
        "processor": "A",
    }


def verdicts(plan: SuitePlan, found: list[Any]) -> dict[str, str]:
    lines = verdict_table(plan, found).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: row[3] for row in cells}


def test_all_hold_where_all_should() -> None:
    assert verdicts(PLAN, results(GOOD)) == dict.fromkeys(HYPOTHESES, "holds")


@pytest.mark.parametrize(
    ("changed", "over", "failing"),
    [
        ({"adamw/default": (1.0, 0.4)}, 0.0, {"H1"}),
        ({"mixed/default": (1.0, 0.0)}, 0.0, {"H2"}),
        ({"mixed/default": (1.0, 0.0), "safe/default": (1.0, 0.03)}, 0.0, {"H2", "H3"}),
        ({"safe/default": (0.97, 0.0)}, 0.0, {"H4"}),
        ({}, 0.05, {"H4"}),
        ({"null_space/gpm": (0.99, 0.19)}, 0.0, {"H6"}),
        ({"norm_matched/default": (1.0, 0.19)}, 0.0, {"H7"}),
    ],
)
def test_each_can_fail_alone(
    changed: dict[str, tuple[float, float]], over: float, failing: set[str]
) -> None:
    found = verdicts(PLAN, results(GOOD | changed, over))
    assert {name for name, words in found.items() if words == "**fails**"} == failing


def test_dear_is_not_cheap_and_what_was_not_run_is_not_judged() -> None:
    dear = [r | {"cpu_seconds": 1.3 * r["cpu_seconds"]} for r in results(GOOD) if r["seed"] == 5]
    dear = [r if r["method"] == "safe" else r | {"cpu_seconds": 1.0} for r in dear]
    found = verdicts(PLAN, dear)
    assert found["H5"] == "**fails** so far"
    assert found["H1"] == "holds so far"
    assert set(verdicts(PLAN, []).values()) == {"not run"}
    assert verdicts(replace(PLAN, sweep=None), results(GOOD))["H2"] == "not run"


@pytest.mark.parametrize(
    ("name", "hypothesis"), [("null_space/gpm", "H6"), ("norm_matched/default", "H7")]
)
def test_a_mean_made_by_few_seeds_is_no_sign(name: str, hypothesis: str) -> None:
    found = [r for r in results(GOOD) if f"{r['method']}/{r['variant']}" != name]
    odd = [result(name, seed, 1.0, 0.9 if seed < 8 else 0.0, 0.0) for seed in SEEDS]
    assert verdicts(PLAN, found + odd)[hypothesis] == "**fails**"
    assert verdicts(PLAN, found + odd[:3])[hypothesis] == "holds so far"


def test_seeds_that_settings_were_chosen_on_are_not_judged() -> None:
    chosen = [r | {"seed": r["seed"] - 5} for r in results(GOOD)]
    assert set(verdicts(PLAN, chosen).values()) == {"not run"}
