"""Run the collapse benchmark: ``python -m benchmarks.collapse.run --suite world``.

Cells that were run before with the same settings are skipped, so an interrupted run goes on where
it stopped. A cell that fails is kept in ``failed/`` and does not stop the others.
"""

from __future__ import annotations

import argparse
import ast
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.collapse.products import fast_bf16_products
from benchmarks.collapse.results import FOLDER, Cell
from benchmarks.collapse.runner import run_cell
from benchmarks.collapse.suites import make_suite
from benchmarks.collapse.tables import write_readme
from benchmarks.collapse.variants import SWEEP, SuitePlan, Variant, read_plan


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen cells and rewrite the tables."""
    chosen = _parse(arguments)
    torch.set_num_threads(chosen.threads)
    cells = list(_cells(chosen, read_plan(chosen.suite)))
    try:
        with fast_bf16_products():
            failed = _run(cells, chosen)
    finally:
        if chosen.results == FOLDER:
            write_readme(chosen.suite)
    if failed:
        raise SystemExit(f"{failed} of {len(cells)} runs failed; see {chosen.results}/*/failed")


def _run(cells: Sequence[tuple[Cell, Variant]], chosen: argparse.Namespace) -> int:
    """Run the cells and say how many failed."""
    progress, failed = tqdm(cells, unit="run"), 0
    for cell, variant in progress:
        progress.set_description(f"{cell.method}/{cell.variant} {cell.task} {cell.seed}")
        try:
            facts = run_cell(cell, variant, folder=chosen.results, again=chosen.again)
        except Exception as error:
            failed += 1
            progress.write(f"{_name(cell)} failed: {error!r}")
            continue
        progress.write(_line(cell, facts))
    return failed


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="world")
    parser.add_argument(
        "--variant",
        nargs="*",
        default=["*"],
        metavar="METHOD/NAME",
        help="patterns such as 'safe/*'; all by default",
    )
    parser.add_argument("--task", nargs="*", help="all of the suite's tasks by default")
    parser.add_argument("--seed", nargs="*", type=int, help="the plan's seeds by default")
    parser.add_argument(
        "--sweep", action="store_true", help="the Pareto curves: their settings and their seeds"
    )
    parser.add_argument("--again", action="store_true", help="run cells that have a result too")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the result files")
    parser.add_argument("--threads", type=int, default=1)
    for name, what in (("option", "suite's configuration"), ("run", "run's settings")):
        parser.add_argument(
            f"--{name}",
            nargs="*",
            default=[],
            metavar="KEY=VALUE",
            help=f"changes of the {what}, for a trial; give --results too",
        )
    return parser.parse_args(arguments)


def _cells(chosen: argparse.Namespace, plan: SuitePlan) -> Iterator[tuple[Cell, Variant]]:
    seeds, variants = plan.seeds, list(plan.variants)
    if chosen.sweep and plan.sweep is not None:
        seeds, variants = plan.sweep.seeds, list(itertools.chain(*plan.curves().values()))
    elif not chosen.sweep:
        variants = [v for v in variants if v.group != SWEEP]
    seeds = tuple(seeds if chosen.seed is None else chosen.seed)
    tasks = chosen.task or make_suite(chosen.suite, seeds[0], {}).tasks
    option, run = _changes(chosen.option), _changes(chosen.run)
    wanted = [
        replace(v, suite={**v.suite, **option}, run={**v.run, **run})
        for v in variants
        if _matches(v, chosen.variant)
    ]
    # Seeds outside: the methods of one seed run close together, so that their times compare.
    for seed, task, variant in itertools.product(seeds, tasks, wanted):
        yield Cell(chosen.suite, variant.method, variant.name, task, seed), variant


def _changes(pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; a value is a Python literal or else text."""
    split = (pair.partition("=") for pair in pairs)
    return {key: _literal(value) for key, _, value in split}


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _matches(variant: Variant, patterns: Sequence[str]) -> bool:
    return any(fnmatch(f"{variant.method}/{variant.name}", pattern) for pattern in patterns)


def _line(cell: Cell, facts: dict[str, Any]) -> str:
    figures = "  ".join(f"{k} {v:.3g}" for k, v in facts["final"].items() if k != "step")
    return f"{_name(cell)}  {figures}  {facts['train_seconds']:.1f} s"


def _name(cell: Cell) -> str:
    return f"{f'{cell.method}/{cell.variant}':28} {cell.task:10} {cell.seed}"


if __name__ == "__main__":
    main()
