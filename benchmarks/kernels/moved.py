"""Bytes that the kernels move per parameter, counted in the interpreter, beside their floors.

    export TRITON_INTERPRET=1
    python -m benchmarks.kernels.moved --output benchmarks/kernels/results/moved.json

What counts is what memory must deliver: every store, and every address that a launch loads, once.
What a program loads again (factors in another tile, K2's weights and steps) comes from the L2
cache. Tables, partial sums and factors count too, and are what exceeds the floor. The command
fails if a kernel moves over 5 % more than its floor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.traffic import Traffic, counted
from safeopt.environment import environment
from safeopt.files import write_json
from safeopt_kernels import lowrank, onesided
from safeopt_kernels.settings import AdamW, Rounding, Seed
from safeopt_kernels.specialisations import roundings_of
from safeopt_kernels.table import Piece

SHAPE = (512, 1024)
COUNT, RANK = 4, 2
SLACK = 1.05
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)
ADAMW = AdamW(lr=1e-3)


@dataclass(frozen=True)
class Case:
    """One way to run a kernel.

    Attributes:
        kernel: name in tables.
        weight: dtype of weights and gradients; factors have it too, moments are fp32.
        rounding: how weights are stored.
        floor: bytes per parameter, from the reads and writes that the step cannot do without.
        run: the launches.
    """

    kernel: str
    weight: torch.dtype
    rounding: Rounding
    floor: int
    run: Callable[[Piece], None]

    def __str__(self) -> str:
        return f"{self.kernel}, {str(self.weight).removeprefix('torch.')}, {self.rounding}"


def cases() -> Iterator[Case]:
    """Every kernel, dtype of weights and rounding."""
    for weight in WEIGHTS:
        w, moments = weight.itemsize, 16
        in_place = partial(_two_passes, rounding="nearest", in_place=True)
        yield Case("K1, steps in the weights", weight, "nearest", 5 * w + moments, in_place)
        for rounding in roundings_of(weight):
            owed = 2 * w if rounding == "kahan" else 0
            two = partial(_two_passes, rounding=rounding)
            yield Case("K1, steps in a buffer", weight, rounding, 6 * w + moments + owed, two)
            one = partial(_one_launch, rounding=rounding)
            yield Case("K2", weight, rounding, 4 * w + moments + owed, one)


def _two_passes(piece: Piece, *, rounding: Rounding, in_place: bool = False) -> None:
    if in_place:
        piece = Piece(piece.p, None, piece.g, piece.m, piece.v, piece.left, piece.right)
    lowrank.propose([piece], COUNT, ADAMW)
    lowrank.apply([piece], torch.zeros(COUNT), rounding, Seed())


def _one_launch(piece: Piece, *, rounding: Rounding) -> None:
    basis = torch.eye(piece.shape[1], RANK * COUNT, dtype=piece.p.dtype)
    onesided.step(piece, basis, ADAMW, rounding, Seed())


def count(case: Case, shape: tuple[int, int] = SHAPE) -> dict[str, Any]:
    """Run a case on a matrix of zeros and count."""
    piece = _matrix(case.weight, shape)
    reached = {name: value for name, value in vars(piece).items() if isinstance(value, Tensor)}
    with counted(reached) as traffic:
        case.run(piece)
    moved = memory_traffic(traffic) / (shape[0] * shape[1])
    return {
        "kernel": case.kernel,
        "weights": str(case.weight).removeprefix("torch."),
        "rounding": case.rounding,
        "floor": case.floor,
        "counted": moved,
        "over_floor": moved / case.floor,
        "launches": traffic.launches,
    }


def _matrix(weight: torch.dtype, shape: tuple[int, int]) -> Piece:
    rows, cols = shape
    like_weights = [torch.zeros(shape, dtype=weight) for _ in range(4)]
    p, step, g, owed = like_weights
    m, v = torch.zeros(shape), torch.zeros(shape)
    left = torch.zeros(COUNT, RANK, rows, dtype=weight)
    right = torch.zeros(COUNT, RANK, cols, dtype=weight)
    return Piece(p, step, g, m, v, left, right, owed)


def memory_traffic(traffic: Traffic) -> int:
    """Bytes stored, and bytes at distinct addresses loaded, each launch for itself."""
    return sum(access.stored + access.distinct_loaded for access in traffic.accesses.values())


def main(argv: Sequence[str]) -> int:
    """Parse the command line, count, write the result file; 1 if a floor is passed by over 5 %."""
    parser = argparse.ArgumentParser(description="Count the bytes that the kernels move.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    rows = []
    for case in cases():
        rows.append(count(case))
        print({name: rows[-1][name] for name in ("kernel", "weights", "rounding", "over_floor")})
    result = {
        "command": f"TRITON_INTERPRET=1 python -m benchmarks.kernels.moved {' '.join(argv)}",
        "environment": environment(),
        "shape": SHAPE,
        "N": COUNT,
        "q": RANK,
        "rows": rows,
    }
    write_json(options.output, result)
    return int(any(row["over_floor"] > SLACK for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
