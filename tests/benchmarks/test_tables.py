from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.collapse import tables, variants
from benchmarks.collapse.brake import brake_table
from benchmarks.collapse.curves import time_ratios
from benchmarks.collapse.results import Cell, load_all, save
from benchmarks.collapse.variants import read_plan
from benchmarks.markdown import fill

PLAN = """
seeds: [0, 1]
columns: {asr: ASR}
defaults:
  safe: {refresh_every: 5}
groups:
  methods:
    - {id: adamw/default, label: AdamW}
    - {id: safe/default, label: ours}
    - {id: safe/p2, label: p = 2, options: {refresh_every: 2}}
"""
SWEEP = """
sweep: {seeds: [0], task: task_nll, settings: 2, rates: [0.5], strengths: {adamw: []}}
"""


@pytest.fixture
def plan_folder(tmp_path: Path) -> Path:
    (tmp_path / "toy.yaml").write_text(PLAN)
    return tmp_path


def result(method: str, variant: str, seed: int, asr: float, **options: Any) -> dict[str, Any]:
    return {
        "method": method,
        "variant": variant,
        "task": "style",
        "seed": seed,
        "settings": {"options": options, "run": {}, "suite_options": {}},
        "aligned": {"asr": 0.02},
        "final": {"asr": asr},
        "train_seconds": 2.0,
        "processor": "a processor",
        "torch_threads": 1,
        "python": "3.12.0",
        "versions": {"safeopt-llm": "0.1.0", "torch": "2.13.0", "transformers": "5.0"},
        "date": f"2026-01-0{seed + 1}T00:00:00",
    }


def test_brake_table_is_made_from_logs(plan_folder: Path) -> None:
    rows = "  trust:\n    - {id: safe/free, label: free, options: {step_limit: null}}\n"
    (plan_folder / "toy.yaml").write_text(PLAN + rows)
    own = result("safe", "default", 0, 0.0, refresh_every=5)
    own["log"] = {"safety/violation": [0.1, 0.3, 0.7, 0.0], "safety/brake": [1.0, 0.5, 0.5, 0.2]}
    own["evaluations"] = [{"asr": 0.04}, {"asr": 0.0}]
    free = result("safe", "free", 0, 0.0, refresh_every=5, step_limit=None)
    free["log"] = {"safety/violation": [2.0, 0.0], "safety/brake": [1.0, 1.0]}
    free["evaluations"] = [{"asr": 0.0}]
    lines = brake_table(read_plan("toy", plan_folder), [own, free]).splitlines()
    assert lines[2:] == [
        "| ours | 0.20 | 0.7 | 0.75 | 0.55 | 0.040 (0.04 to 0.04) | 1 |",
        "| free | 2.00 | 2.0 | 1.00 | 1.00 | - | 1 |",
    ]


def test_plan_merges_defaults_and_options(plan_folder: Path) -> None:
    plan = read_plan("toy", plan_folder)
    assert plan.seeds == (0, 1)
    assert [v.options for v in plan.variants] == [{}, {"refresh_every": 5}, {"refresh_every": 2}]
    with pytest.raises(ValueError, match="known: toy"):
        read_plan("moon", plan_folder)
    (plan_folder / "toy.yaml").write_text(PLAN + "    - {id: safe/p2, label: again}\n")
    with pytest.raises(ValueError, match="named twice: safe/p2"):
        read_plan("toy", plan_folder)


@pytest.mark.parametrize(("row", "known"), [("{lr: 0.5}", True), ("{lr: 0.25}", False)])
def test_a_setting_of_a_curve_may_have_a_row_if_it_is_the_same(
    plan_folder: Path, row: str, known: bool
) -> None:
    group = f'  rate:\n    - {{id: "adamw/lr=0.5", label: slower, run: {row}}}\n'
    (plan_folder / "toy.yaml").write_text(PLAN + group + SWEEP)
    if known:
        rows = [v.group for v in read_plan("toy", plan_folder).variants if v.name == "lr=0.5"]
        assert rows == ["rate", "sweep"]
    else:
        with pytest.raises(ValueError, match=r"named twice: adamw/lr=0\.5"):
            read_plan("toy", plan_folder)


def test_table_is_made_from_result_files(plan_folder: Path, tmp_path: Path) -> None:
    plan = read_plan("toy", plan_folder)
    for seed, asr in enumerate((0.9, 1.0)):
        adamw = result("adamw", "default", seed, asr) | ({"cpu_seconds": 2.0} if seed else {})
        save(Cell("toy", "adamw", "default", "style", seed), adamw)
        own = result("safe", "default", seed, 0.031, refresh_every=5)
        own |= {"rows": {"anchor_rows": 160 - 30 * seed}, "cpu_seconds": 3.0 + seed}
        save(Cell("toy", "safe", "default", "style", seed), own)
    stale = result("safe", "p2", 0, 0.5, refresh_every=3)
    save(Cell("toy", "safe", "p2", "style", 0), stale)
    lines = tables.table(plan, list(load_all("toy")), "methods").splitlines()
    assert lines == [
        "|  | style: ASR | time | anchor rows | seeds |",
        "| --- | --- | --- | --- | --- |",
        "| aligned model | 0.02 |  |  | 2 |",
        "| AdamW | 0.95 (0.90 to 1.00) | 1.00 | - | 2 |",
        "| ours | 0.03 | 2.00 | 145 | 2 |",
    ]


def test_times_of_different_occasions_or_processors_are_not_compared() -> None:
    adamw = {"cpu_seconds": 2.0, "date": "2026-01-01T23:00:00+00:00", "processor": "A"}
    same = {"cpu_seconds": 3.0, "date": "2026-01-02T00:59:00+00:00", "processor": "A"}
    later, other = same | {"date": "2026-01-02T01:01:00+00:00"}, same | {"processor": "B"}
    untimed = {"date": adamw["date"], "processor": "A"}
    pairs = [(run, adamw) for run in (same, later, other, untimed)]
    assert time_ratios(pairs) == [1.5]


def test_a_task_apart_has_a_table_of_its_own(
    plan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plan_folder / "toy.yaml").write_text(PLAN + "apart: [maths]\n")
    monkeypatch.setattr(tables, "read_plan", lambda suite: read_plan(suite, plan_folder))
    for task, asr in (("style", 0.9), ("maths", 0.4)):
        facts = result("adamw", "default", 0, asr) | {"task": task}
        save(Cell("toy", "adamw", "default", task, 0), facts)
    parts = dict(tables.parts_of("toy", plan_folder / "results"))
    assert "style: ASR" in parts["toy-methods"]
    assert "maths" not in parts["toy-methods"]
    assert "| AdamW | 0.40 | - |" in parts["toy-maths"]
    assert "style" not in parts["toy-maths"]
    assert "Runs: 2" in parts["toy-machine"]


@pytest.fixture(autouse=True)
def results_in_a_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (save, load_all):
        monkeypatch.setattr(function, "__defaults__", (tmp_path / "results",))


def test_fill_replaces_between_markers_alone() -> None:
    text = "before\n<!-- a -->\nold\n<!-- /a -->\nafter\n"
    filled = fill(text, {"a": "new | \\1"})
    assert filled == "before\n<!-- a -->\nnew | \\1\n<!-- /a -->\nafter\n"
    assert fill(filled, {"a": "new | \\1"}) == filled
    with pytest.raises(ValueError, match="markers of 'b'"):
        fill(text, {"b": ""})


def test_readme_tables_are_those_of_the_committed_results() -> None:
    """The README in the repository was made from the result files beside it."""
    folder = Path(variants.__file__).parent / "results"
    text = tables.README.read_text(encoding="utf-8")
    for suite in sorted(path.name for path in folder.iterdir()):
        assert fill(text, dict(tables.parts_of(suite, folder))) == text
