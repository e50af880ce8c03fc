from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.collapse.methods import METHODS
from benchmarks.collapse.results import Cell, load, load_all, save
from benchmarks.collapse.runner import StepLog, run_cell
from benchmarks.collapse.variants import Variant, read_plan
from tests.benchmarks.conftest import SmallWorld, small_world

CELL = Cell("world", "adamw", "default", "style", 0)


def variant(method: str, options: dict[str, Any] | None = None) -> Variant:
    return Variant("methods", method, "default", method, options or {}, {}, {})


def run(cell: Cell, chosen: Variant, folder: Path, again: bool = False) -> dict[str, Any]:
    return run_cell(cell, chosen, folder=folder, again=again, make=small_world)


def test_a_finished_cell_is_not_run_again(world: SmallWorld, tmp_path: Path) -> None:
    first = run(CELL, variant("adamw"), tmp_path)
    marked = first | {"date": "kept"}
    save(CELL, marked, tmp_path)
    assert run(CELL, variant("adamw"), tmp_path) == marked
    assert run(CELL, variant("adamw"), tmp_path, again=True)["date"] != "kept"


def test_changed_settings_make_the_result_stale(world: SmallWorld, tmp_path: Path) -> None:
    cell = Cell("world", "mixed", "default", "questions", 0)
    first = run(cell, variant("mixed", {"anchors_per_step": 1.0}), tmp_path)
    second = run(cell, variant("mixed", {"anchors_per_step": 2.0}), tmp_path)
    assert first["settings"] != second["settings"]
    assert load(cell, tmp_path) == second


def test_same_seed_gives_the_same_figures(world: SmallWorld, tmp_path: Path) -> None:
    first = run(CELL, variant("adamw"), tmp_path / "a")
    second = run(CELL, variant("adamw"), tmp_path / "b")
    for key in ("aligned", "final", "evaluations", "log"):
        assert first[key] == second[key]


def test_an_interrupted_run_leaves_no_result(
    world: SmallWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(100))

    def stop(*_: Any) -> dict[str, float]:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return {}

    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.collapse.methods.adamw.Training.step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(CELL, variant("adamw"), tmp_path)
    assert list(load_all("world", tmp_path)) == []
    assert run(CELL, variant("adamw"), tmp_path)["final"]["step"] == 6


def test_a_failed_run_is_kept_and_leaves_no_result(world: SmallWorld, tmp_path: Path) -> None:
    cell = Cell("world", "ewc", "default", "style", 0)
    with pytest.raises(ValueError, match="more than the budget"):
        run(cell, variant("ewc", {"anchors_per_step": 0.1}), tmp_path)
    assert list(load_all("world", tmp_path)) == []
    (kept,) = (tmp_path / "world" / "failed").glob("*.json")
    facts = json.loads(kept.read_text())
    assert facts["settings"]["options"] == {"anchors_per_step": 0.1}
    assert "more than the budget" in facts["error"]


def test_facts_are_plain_json(world: SmallWorld, tmp_path: Path) -> None:
    facts = run(CELL, variant("adamw"), tmp_path)
    assert json.loads(CELL.path(tmp_path).read_text()) == facts
    assert [e["step"] for e in facts["evaluations"]] == [3, 6]
    assert facts["versions"]["torch"]
    assert facts["peak_memory_mb"] > 0
    assert facts["train_seconds"] > 0
    refused = facts["refused"]
    assert {name: len(bits) for name, bits in refused.items()} == {"harmful": 16, "harmless": 32}
    asr = 1 - refused["harmful"].count("1") / 16
    assert facts["final"]["asr"] == pytest.approx(asr)
    assert facts["final"]["over_refusal"] == pytest.approx(refused["harmless"].count("1") / 32)
    assert set(facts["aligned"]) | {"step"} == set(facts["final"])


def test_every_method_of_the_world_plan_takes_its_options(
    world: SmallWorld, tmp_path: Path
) -> None:
    plan = read_plan("world")
    chosen = {v.method: v for v in reversed(plan.variants)}  # the first of a method without default
    chosen |= {v.method: v for v in plan.variants if v.name == "default"}
    assert set(chosen) == set(METHODS) - {"safe_lora", "asft"}
    for method in sorted(chosen, key=lambda name: name == "norm_matched"):
        cell = Cell("world", method, chosen[method].name, "questions", 0)
        check_facts(run(cell, chosen[method], tmp_path))


def test_every_method_of_the_lora_plan_takes_its_options(world: SmallWorld, tmp_path: Path) -> None:
    def lora_world(name: str, seed: int, options: Any) -> SmallWorld:
        return small_world(name, seed, {"lora_rank": 2, **options})

    default_of = {v.method: v for v in read_plan("world_lora").variants if v.name == "default"}
    assert {"safe_lora", "asft"} < set(default_of)
    for method, chosen in default_of.items():
        cell = Cell("world_lora", method, "default", "questions", 0)
        check_facts(run_cell(cell, chosen, folder=tmp_path, make=lora_world))


def check_facts(facts: dict[str, Any]) -> None:
    assert facts["final"]["step"] == 6
    assert all(math.isfinite(value) for value in facts["final"].values())
    assert facts["rows"]["task_rows"] >= 6 * 8
    assert facts["rows"]["anchor_rows"] <= max(6 * 3.2, 2 * 16)  # the guard refreshes twice


@pytest.mark.parametrize(("suite", "budget"), [("world", 3.2), ("world_lora", 3.2), ("smol", 1.6)])
def test_methods_with_anchors_have_one_budget(suite: str, budget: float) -> None:
    plan = read_plan(suite)
    for variant in [v for rows in plan.curves().values() for v in rows]:
        options = variant.options
        if "anchors_per_refresh" in options:
            rate = options["anchors_per_refresh"] / options["refresh_every"]
        else:
            rate = options.get("anchors_per_step", budget)
        assert rate == budget, variant


def test_a_method_that_needs_another_result_says_which(world: SmallWorld, tmp_path: Path) -> None:
    cell = Cell("world", "norm_matched", "default", "style", 0)
    with pytest.raises(FileNotFoundError, match="needs the result of safe/default"):
        run(cell, variant("norm_matched", {"like": "safe/default"}), tmp_path)


def test_step_log_averages_windows() -> None:
    log = StepLog(every=2)
    for loss in (1.0, 3.0, 5.0):
        log.add({"loss": loss})
    assert log.facts() == {"every": 2, "loss": [2.0, 5.0]}


def test_transcripts_are_written_beside_the_result(world: SmallWorld, tmp_path: Path) -> None:
    class Talking(SmallWorld):
        def transcripts(self) -> list[dict[str, Any]]:
            return [{"prompt": "p", "reply": "r", "refused": True}]

    def make(name: str, seed: int, options: Any) -> Talking:
        return Talking(seed, small_world(name, seed, options).config)

    run_cell(CELL, variant("adamw"), folder=tmp_path, make=make)
    written = CELL.path(tmp_path).with_suffix(".jsonl").read_text(encoding="utf-8")
    assert json.loads(written) == {"prompt": "p", "reply": "r", "refused": True}
    assert len(list(load_all("world", tmp_path))) == 1
