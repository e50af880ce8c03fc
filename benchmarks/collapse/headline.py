"""Repeat the synthetic world's headline and hold it against the committed results.

    python -m benchmarks.collapse.headline            # make bench-world

Runs AdamW, SafeAdamW and mixing afresh, on the seeds and tasks of the plan, and compares each
method's mean ASR, over-refusal and task accuracy with the interval that the committed runs state.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.collapse.results import FOLDER, Cell, load
from benchmarks.collapse.runner import MakeSuite, run_cell
from benchmarks.collapse.suites import make_suite
from benchmarks.collapse.variants import DEFAULT, SuitePlan, Variant, read_plan

SUITE = "world"
METHODS = ("adamw", "safe", "mixed")
METRICS = ("asr", "over_refusal", "task_accuracy")
FLOOR = 0.02  # five of 256 test prompts: the least half-width that is stated
_QUANTILE = 2.0

Facts = Mapping[str, Any]


def stated_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the mean of as many new runs falls in about 95 of 100 repetitions.

    mean ± max(0.02, 2 sd sqrt(2 / n)), cut to [0, 1]: both means vary.
    """
    spread = stdev(values) if len(values) > 1 else 0.0
    half = max(FLOOR, _QUANTILE * spread * math.sqrt(2 / len(values)))
    return max(0.0, fmean(values) - half), min(1.0, fmean(values) + half)


def compare(
    committed: Mapping[str, Sequence[Facts]], repeated: Mapping[str, Sequence[Facts]]
) -> tuple[list[str], bool]:
    """Lines of a table, and whether every repeated mean lies in its interval."""
    lines, holds = [f"{'method':8} {'figure':14} {'stated interval':>16} {'repeated':>9}"], True
    for method, metric in itertools.product(committed, METRICS):
        low, high = stated_interval([r["final"][metric] for r in committed[method]])
        mean = fmean(r["final"][metric] for r in repeated[method])
        inside = low <= mean <= high
        holds &= inside
        verdict = "" if inside else "  outside"
        lines.append(f"{method:8} {metric:14} {low:7.3f} to {high:.3f} {mean:9.3f}{verdict}")
    return lines, holds


def cells_of(plan: SuitePlan, tasks: Sequence[str]) -> dict[str, list[tuple[Cell, Variant]]]:
    """The headline's runs by method."""
    default = {v.method: v for v in plan.variants if v.name == DEFAULT}
    return {
        method: [
            (Cell(SUITE, method, DEFAULT, task, seed), default[method])
            for seed, task in itertools.product(plan.seeds, tasks)
        ]
        for method in METHODS
    }


def repeat(folder: Path, make: MakeSuite = make_suite, committed_folder: Path = FOLDER) -> bool:
    """Run the headline into ``folder``, print the comparison and say whether it holds.

    Raises:
        FileNotFoundError: a committed result is missing or is of other settings.
    """
    plan = read_plan(SUITE)
    cells = cells_of(plan, make(SUITE, plan.seeds[0], {}).tasks)
    committed = {
        method: [_committed(cell, variant, committed_folder) for cell, variant in own]
        for method, own in cells.items()
    }
    repeated: dict[str, list[Facts]] = {method: [] for method in cells}
    for cell, variant in tqdm(list(itertools.chain(*cells.values())), unit="run"):
        facts = run_cell(cell, variant, folder=folder, make=make)
        repeated[cell.method].append(facts)
    lines, holds = compare(committed, repeated)
    print("\n".join([*lines, "the headline holds" if holds else "the headline does not hold"]))
    return holds


def _committed(cell: Cell, variant: Variant, folder: Path) -> Facts:
    facts = load(cell, folder)
    if facts is None or not variant.made(facts):
        raise FileNotFoundError(
            f"no committed result of {cell.method} for {cell.task}, seed {cell.seed} with the "
            "settings of the plan: "
            f"python -m benchmarks.collapse.run --variant {cell.method}/{cell.variant}"
        )
    return facts


def main(arguments: Sequence[str] | None = None) -> None:
    """Repeat the headline; the exit status is 1 when it does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench-world"))
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    raise SystemExit(0 if repeat(chosen.output) else 1)


if __name__ == "__main__":
    main()
