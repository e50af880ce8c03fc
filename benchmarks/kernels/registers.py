"""Compile every form of every kernel for every target and write what the compilers made of it.

    python -m benchmarks.kernels.registers --output benchmarks/kernels/results/registers.json

No GPU is needed. The command fails if a kernel breaks a ceiling; the tables in docs/kernels.md are
made from the result file by ``python -m benchmarks.kernels.tables``. The tests compile every form
again, and hold the result file to the kernels' sources by their digest.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.kernels.ceilings import kernel_name, problems
from benchmarks.kernels.compiled import TARGETS, backend, compile_for
from safeopt.environment import environment
from safeopt.files import write_json
from safeopt_kernels import adamw_lowrank, adamw_onesided, rounding
from safeopt_kernels.specialisations import specialisations
from safeopt_kernels.table import COLUMNS


def digest() -> str:
    """What the compiled forms follow from: the kernels' sources, and the list of forms."""
    files = [Path(module.__file__ or "") for module in (adamw_lowrank, adamw_onesided, rounding)]
    forms = [
        f"{form.full_signature} {form.constants} {form.divisible} {form.warps} {COLUMNS}"
        for kind in ("cuda", "hip")
        for form in specialisations(kind)
    ]
    contents = [file.read_text() for file in files] + forms
    return hashlib.sha256("\0".join(contents).encode()).hexdigest()


def rows(pool: Executor, targets: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the compilers make of every form of every kernel, target by target."""
    forms = [(t, form.name) for t in targets for form in specialisations(backend(t))]
    return pool.map(_row, *zip(*forms, strict=True))


def compilers(workers: int) -> ProcessPoolExecutor:
    """Processes that compile; each has a Triton of its own."""
    return ProcessPoolExecutor(workers, get_context("spawn"))


def _row(target: str, name: str) -> dict[str, Any]:
    (form,) = (form for form in specialisations(backend(target)) if form.name == name)
    made = compile_for(form, target)
    return {
        "kernel": kernel_name(form),
        "specialisation": form.name,
        "target": target,
        **asdict(made),
        "problems": problems(form, target, made),
    }


def main(argv: Sequence[str]) -> int:
    """Parse the command line, compile, write the result file; 1 if a ceiling broke."""
    parser = argparse.ArgumentParser(description="Compile the kernels ahead of time.")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    options = parser.parse_args(argv)
    made = []
    with compilers(options.workers) as pool:
        for row in tqdm(rows(pool, options.targets)):
            made.append(row)
            for problem in row["problems"]:
                print(f"{row['target']} {row['specialisation']}: {problem}", flush=True)
    result = {
        "command": f"python -m benchmarks.kernels.registers {' '.join(argv)}",
        "environment": environment(),
        "sources": digest(),
        "rows": made,
    }
    write_json(options.output, result)
    return int(any(row["problems"] for row in made))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
