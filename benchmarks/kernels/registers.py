"""Compile every form of every kernel for every target and write what the compilers made of it.

    python -m benchmarks.kernels.registers --output benchmarks/kernels/results/registers.json

No GPU is needed. The command fails if a kernel breaks a ceiling; the tables in docs/kernels.md are
made from the result file by ``python -m benchmarks.kernels.tables``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.kernels.ceilings import kernel_name, problems
from benchmarks.kernels.compiled import TARGETS, backend, compile_for
from safeopt.environment import environment
from safeopt.files import write_json
from safeopt_kernels.specialisations import specialisations


def rows(targets: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row for every form of every kernel and every target."""
    for target in targets:
        for specialisation in specialisations(backend(target)):
            made = compile_for(specialisation, target)
            yield {
                "kernel": kernel_name(specialisation),
                "specialisation": specialisation.name,
                "target": target,
                **asdict(made),
                "problems": problems(specialisation, target, made),
            }


def main(argv: Sequence[str]) -> int:
    """Parse the command line, compile, write the result file; 1 if a ceiling broke."""
    parser = argparse.ArgumentParser(description="Compile the kernels ahead of time.")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.kernels.registers {' '.join(argv)}",
        "environment": environment(),
        "rows": [],
    }
    for row in rows(options.targets):
        result["rows"].append(row)
        for problem in row["problems"]:
            print(f"{row['target']} {row['specialisation']}: {problem}")
    write_json(options.output, result)
    print(f"{len(result['rows'])} kernels compiled")
    return int(any(row["problems"] for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
