"""Tables and figure of this folder's README, made from the result files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.collapse.results import Cell, load
from benchmarks.collapse.variants import Variant, read_plan
from benchmarks.markdown import fill
from benchmarks.theory.model import TASKS
from safeopt.files import write_text

HERE = Path(__file__).parent
CASES = {
    "orthogonal": "toy, task gradient orthogonal to the anchors'",
    "overlapping": "toy, overlap 0.3",
    "flat": "toy, flat level set",
    "world": "synthetic world",
}
SCHEDULES = ("safe/default", "safe/p10")  # compared with the rows of the group "schedule"


def write_report() -> None:
    """Rewrite the README's tables and draw the figure."""
    parts = {}
    results = {name: _read(name) for name in ("toy", "world")}
    if all(results.values()):
        parts["slopes"] = slopes_table([r for r in results.values() if r])
        draw([r for r in results.values() if r], HERE / "drift.svg")
    parts["schedules"] = schedules_table()
    page = HERE / "README.md"
    write_text(page, fill(page.read_text(encoding="utf-8"), parts))


def _read(name: str) -> dict[str, Any] | None:
    path = HERE / "results" / f"{name}.json"
    if not path.exists():
        return None
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def slopes_table(results: list[dict[str, Any]]) -> str:
    """Exponents of t per case and projector, of p per case."""
    summary = {case: s for r in results for case, s in r["summary"].items()}
    labels = list(next(iter(summary.values()))["time"])
    head = ["", "no projector, early", *(_head(label) for label in labels)]
    head += ["exponent of p", "predicted / measured"]
    rows = [head, ["---"] * len(head)]
    for case, found in summary.items():
        cells = [_interval(found["early"])]
        cells += [_interval(found["time"][label]) for label in labels]
        cells += [_interval(found["period"]), _interval(found["frozen_predicted_over_measured"])]
        rows.append([CASES[case], *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _head(label: str) -> str:
    return {"none": "no projector", "frozen": "frozen projector"}.get(label, label)


def _interval(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "no drift"
    return f"{found['mean']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def schedules_table() -> str:
    """Anchor passes, refusals and task of every schedule, means and ranges over the seeds."""
    plan = read_plan("world")
    variants = [v for v in plan.variants if f"{v.method}/{v.name}" in SCHEDULES]
    variants += [v for v in plan.variants if v.group == "schedule"]
    names = ["ASR", "over-refusal", "task accuracy", "task NLL"]
    head = ["", "passes", *(f"{t}: {n}" for t in TASKS for n in names), "seeds"]
    rows = [head, ["---"] * len(head)]
    for variant in variants:
        row = _schedule_row(variant, plan.seeds)
        rows += [row] if row else []
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _schedule_row(variant: Variant, seeds: tuple[int, ...]) -> list[str] | None:
    by_task = {
        task: [
            facts
            for seed in seeds
            if (facts := load(Cell("world", variant.method, variant.name, task, seed)))
        ]
        for task in TASKS
    }
    everything = [facts for results in by_task.values() for facts in results]
    if not everything:
        return None
    cells = [f"{fmean(anchor_passes(facts) for facts in everything):.0f}"]
    for results in by_task.values():
        for metric in ("asr", "over_refusal", "task_accuracy", "task_nll"):
            values = [facts["final"][metric] for facts in results]
            cells.append(f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    return [variant.label, *cells, str(len({f["seed"] for f in everything}))]


def anchor_passes(facts: Mapping[str, Any]) -> float:
    """Refreshes of a run, plus half of one for each forward pass of its own.

    Both are counted in rows; results older than the count kept to their fixed period.
    """
    options = facts["settings"]["options"]
    each = options["anchors_per_refresh"]
    if "rows" not in facts:
        return float(facts["settings"]["run"]["steps"] / options["refresh_every"])
    rows = facts["rows"]
    own_forward = rows["forward_rows"] - facts["anchors"]  # beyond the calibration
    return float(rows["anchor_rows"] + 0.5 * own_forward) / float(each)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Drift over time, one panel per case, with guides of slope 2 and 4."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "safeopt"
    from matplotlib import pyplot

    runs = [run for r in results for run in r["runs"]]
    cases = [case for case in CASES if case != "flat"]
    figure, axes = pyplot.subplots(1, len(cases), figsize=(4 * len(cases), 3.6))
    for axis, case in zip(axes, cases, strict=True):
        own = [r for r in runs if r["case"] == case]
        for number, label in enumerate(dict.fromkeys(r["label"] for r in own)):
            lines = [r for r in own if r["label"] == label]
            for i, run in enumerate(lines):
                name = _head(label) if i == 0 else None
                axis.plot(run["times"], run["values"], color=f"C{number}", alpha=0.35, label=name)
        _guides(axis, next(r for r in own if r["label"] == "frozen"))
        axis.set(xscale="log", yscale="log", title=CASES[case], xlabel="time t = steps x rate")
    axes[0].set_ylabel("drift u, nats²")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _guides(axis: Any, run: Mapping[str, Any]) -> None:
    times, end = run["times"], run["values"][-1]
    for exponent, style in ((4, ":"), (2, "--")):
        guide = [end * (t / times[-1]) ** exponent for t in times]
        axis.plot(times, guide, "k" + style, linewidth=0.8, label=f"t^{exponent}")
