"""Forecast planned runs, then make them: ``python -m benchmarks.forecast.run [--suite smol]``.

A cell is a task, a seed, all weights or a LoRA adapter, a learning rate and a number of steps. It
leaves what the pilots read, the cheap predictors and the outcome in one line of
``results/<suite>.jsonl``; cells that are there are skipped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.forecast.planned import Cell, Study, Suite
from safeopt.files import read_jsonl, write_jsonl


def make_suite(name: str) -> Suite:
    """A suite by name: "world" or "smol"."""
    if name == "smol":
        from benchmarks.forecast.smols import Smols

        return Smols()
    from benchmarks.forecast.worlds import Worlds

    return Worlds()


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=("world", "smol"), default="world")
    parser.add_argument("--results", type=Path, help="default: results/<suite>.jsonl")
    parser.add_argument("--seed", type=int, nargs="*", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    suite = make_suite(arguments.suite)
    results = arguments.results or suite.results
    done = [row for _, row in read_jsonl(results)] if results.exists() else []
    known = {Cell(**{k: row[k] for k in Cell.__dataclass_fields__}) for row in done}
    study = Study(suite)
    missing = [cell for cell in suite.cells(arguments.seed) if cell not in known]
    for cells in tqdm(suite.shared(missing), unit="run"):
        done += study.make(cells)
        write_jsonl(results, done)
    print(json.dumps({"runs": len(done)}))


if __name__ == "__main__":
    main()
