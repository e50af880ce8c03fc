"""Measure the theory: ``python -m benchmarks.theory.run``, or ``--part toy`` and so on.

Writes one file per part to ``results/``, then the tables of the README and the figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.theory.fit import summarise
from benchmarks.theory.flows import System, drift
from benchmarks.theory.toy import Toy
from safeopt.environment import environment
from safeopt.files import write_json

FOLDER = Path(__file__).parent / "results"
PERIODS = (2, 4, 8, 16)
TOY = (2e-4, 1024)  # step and number of steps
WORLD = (5e-5, 128)
TOY_CASES: dict[str, dict[str, Any]] = {
    "orthogonal": {},
    "overlapping": {"overlap": 0.3},
    "flat": {"curved": False},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen parts and rewrite tables and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["toy", "world", "tables"], nargs="*")
    parser.add_argument("--results", type=Path, default=FOLDER)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {"toy": toy, "world": world}
    for name in chosen.part or parts:
        if name in parts:
            runs = list(tqdm(parts[name](), unit="run", desc=name))
            facts = {"part": name, "runs": runs, "summary": summarise(runs)} | environment()
            chosen.results.mkdir(parents=True, exist_ok=True)
            write_json(chosen.results / f"{name}.json", facts)
    if chosen.results == FOLDER:
        from benchmarks.theory.report import write_report

        write_report()


def toy(instances: int = 20) -> Iterator[dict[str, Any]]:
    """Every case and period on random toys."""
    for case, options in TOY_CASES.items():
        for seed in range(instances):
            yield from _runs(case, str(seed), partial(Toy, seed, **options), *TOY)


def world() -> Iterator[dict[str, Any]]:
    """Every period on three seeds and both tasks of the synthetic world."""
    from benchmarks.theory.model import TASKS, WorldSystem

    for seed in range(3):
        for task in TASKS:
            yield from _runs("world", f"{task} {seed}", partial(WorldSystem, seed, task), *WORLD)


def _runs(
    case: str, instance: str, make: Callable[[], System], step: float, steps: int
) -> Iterator[dict[str, Any]]:
    periods = {"none": None, "frozen": steps} | {f"p = {p}": p for p in PERIODS}
    for label, period in periods.items():
        found = asdict(drift(make(), period, step=step, steps=steps))
        about = {"case": case, "instance": instance, "label": label}
        figures = {name: _short(value) for name, value in found.items()}
        yield about | {"period": period, "step": step} | figures


def _short(value: Any) -> Any:
    """Six digits are enough for a file."""
    if isinstance(value, list):
        return [_short(v) for v in value]
    return float(f"{value:.6g}")


if __name__ == "__main__":
    main()
