"""Markdown tables made from the result files, between markers in this folder's README."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.collapse.agreement import agreement_table, result_path
from benchmarks.collapse.brake import GROUP as TRUST
from benchmarks.collapse.brake import brake_table
from benchmarks.collapse.curves import cells_of, time_ratios
from benchmarks.collapse.pareto import pareto_table
from benchmarks.collapse.results import FOLDER, load_all
from benchmarks.collapse.variants import DEFAULT, SWEEP, SuitePlan, Variant, read_plan
from benchmarks.collapse.verdicts import verdict_table
from benchmarks.markdown import fill
from safeopt.files import write_text

README = Path(__file__).parent / "README.md"
FRONT_PAGE = Path(__file__).parents[2] / "README.md"

Facts = Mapping[str, Any]


def table(plan: SuitePlan, results: Sequence[Facts], *groups: str) -> str:
    """Groups of variants: a row each, per task the plan's columns over the seeds.

    Behind them the median CPU time over AdamW's of the same task, seed, occasion and processor, and
    anchor rows of a run. A cell holds the mean and, behind it, the smallest and largest seed when
    they differ.
    Variants that have not been run, or whose settings have changed since, have no row; tasks that
    none of them has run have no columns.
    """
    variants = [v for v in plan.variants if v.group in groups]
    made = [(v.label, [r for r in results if v.made(r)]) for v in variants]
    tasks = sorted({str(r["task"]) for _, own in made for r in own})
    if not tasks:
        return "Not run yet."
    heads = [f"{task}: {label}" for task in tasks for label in plan.columns.values()]
    rows = [["", *heads, "time", "anchor rows", "seeds"], ["---"] * (len(heads) + 4)]
    adamw = cells_of(_adamw(plan), results)
    rows += [[*_row("aligned model", results, tasks, plan, "aligned"), "", "", _seeds(results)]]
    rows += [
        [*_row(label, own, tasks, plan, "final"), _time(own, adamw), _anchor_rows(own), _seeds(own)]
        for label, own in made
        if own
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(
    label: str, results: Sequence[Facts], tasks: Sequence[str], plan: SuitePlan, when: str
) -> list[str]:
    return [label] + [
        _cell([r[when][metric] for r in _one_a_seed(results, task)])
        for task in tasks
        for metric in plan.columns
    ]


def _adamw(plan: SuitePlan) -> Variant:
    return next(v for v in plan.variants if (v.method, v.name) == ("adamw", DEFAULT))


def _time(results: Sequence[Facts], adamw: Mapping[tuple[str, int], Facts]) -> str:
    cells = {(r["task"], r["seed"]): r for r in results}
    ratios = time_ratios([(cells[key], adamw[key]) for key in sorted(cells.keys() & adamw.keys())])
    return f"{median(ratios):.2f}" if ratios else "-"


def _seeds(results: Sequence[Facts]) -> str:
    return str(len({r["seed"] for r in results}))


def _anchor_rows(results: Sequence[Facts]) -> str:
    """Mean number of anchors that went forward and backward in a run; the first results lack it."""
    counted = [r["rows"]["anchor_rows"] for r in results if "rows" in r]
    return f"{fmean(counted):.0f}" if counted else "-"


def _one_a_seed(results: Sequence[Facts], task: str) -> list[Facts]:
    return list({r["seed"]: r for r in results if r["task"] == task}.values())


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    low, high, mean = min(values), max(values), fmean(values)
    if high - low < 0.005:
        return f"{mean:.2f}"
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def machines(results: Sequence[Facts]) -> str:
    """Where and with what the results were made, one line per distinct setting."""
    if not results:
        return "Not run yet."
    seen = sorted({_machine(r) for r in results})
    dates = sorted(str(r["date"])[:10] for r in results)
    return "\n".join([*seen, f"Runs: {len(results)}, from {dates[0]} to {dates[-1]}."])


def _machine(result: Facts) -> str:
    versions = result["versions"]
    names = ", ".join(f"{k} {versions[k]}" for k in ("safeopt-llm", "torch", "transformers"))
    where = f"{result['processor']}, {result['torch_threads']} thread(s)"
    return f"Made on {where}; Python {result['python']}, {names}."


def parts_of(suite: str, folder: Path = FOLDER) -> Iterator[tuple[str, str]]:
    """Marker names and what belongs between them."""
    plan, every = read_plan(suite), list(load_all(suite, folder))
    results = [r for r in every if r["task"] not in plan.apart]
    for group in dict.fromkeys(v.group for v in plan.variants if v.group != SWEEP):
        yield f"{suite}-{group}", table(plan, results, group)
    if any(v.group == TRUST for v in plan.variants):
        yield f"{suite}-brake", brake_table(plan, results)
    if plan.sweep is not None:
        yield f"{suite}-pareto", pareto_table(plan, results)
        yield f"{suite}-verdicts", verdict_table(plan, results)
    for task in plan.apart:
        own = [r for r in every if r["task"] == task]
        yield f"{suite}-{task}", table(plan, own, "methods", "rivals")
    yield f"{suite}-machine", machines(every)
    agreement = result_path(suite, folder)
    if agreement.exists():
        facts = json.loads(agreement.read_text(encoding="utf-8"))
        yield f"{suite}-agreement", agreement_table(facts)


def write_readme(suite: str) -> None:
    """Rewrite one suite's tables in the README, and the front page's table where it has one."""
    parts = dict(parts_of(suite))
    write_text(README, fill(README.read_text(encoding="utf-8"), parts))
    front = FRONT_PAGE.read_text(encoding="utf-8")
    if f"<!-- {suite} -->" in front:
        write_text(FRONT_PAGE, fill(front, {suite: parts[f"{suite}-methods"]}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="world")
    write_readme(parser.parse_args().suite)
