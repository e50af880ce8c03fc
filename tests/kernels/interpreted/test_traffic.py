"""Bytes that the kernels move, counted access by access, against the floors of the design."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import moved
from benchmarks.kernels.traffic import ELSEWHERE, counted
from safeopt_kernels import lowrank, onesided
from safeopt_kernels.settings import AdamW
from tests.kernels.interpreted.pieces import random_piece

WEIGHTS = ("p", "g", "m", "v", "step", "compensation")
FACTORS = ("left", "right")


@pytest.mark.parametrize(
    ("weight", "rounding", "floor"),
    [
        (torch.bfloat16, "nearest", 28),
        (torch.bfloat16, "stochastic", 28),
        (torch.bfloat16, "kahan", 32),
        (torch.float32, "nearest", 40),
    ],
)
def test_two_passes(weight: torch.dtype, rounding: str, floor: int) -> None:
    shape, rank, count = (130, 272), 2, 3
    generator = torch.Generator().manual_seed(0)
    piece = random_piece(generator, shape, rank, count, weight, weight)
    with counted({name: getattr(piece, name) for name in (*WEIGHTS, *FACTORS)}) as traffic:
        lowrank.propose([piece], count, AdamW(lr=1e-3))
        lowrank.apply([piece], torch.zeros(count), rounding)
    parameters = shape[0] * shape[1]
    assert traffic.moved(*WEIGHTS) == floor * parameters
    # Each pass takes every factor from memory once; tiles read it again from the cache.
    factors = 2 * rank * count * sum(shape) * weight.itemsize
    assert traffic.distinct(*FACTORS) == factors
    assert traffic.moved(ELSEWHERE) == 0
    everything = sum(a.loaded + a.stored for a in traffic.accesses.values())
    rest = everything - traffic.moved(*WEIGHTS) - traffic.moved(*FACTORS)
    assert rest < 0.05 * floor * parameters
    assert traffic.launches == {"propose": 1, "apply": 1}


def test_masked_lanes_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    piece = random_piece(generator, (3, 5), 0, 1, torch.float32, torch.float32)
    with counted({"p": piece.p, "m": piece.m}) as traffic:
        lowrank.propose([piece], 1, AdamW(lr=1e-3))
    assert traffic.moved("p") == 4 * 15
    assert traffic.moved("m") == 2 * 4 * 15


@pytest.mark.parametrize(
    "case", list(moved.cases()), ids=lambda c: f"{c.kernel} {c.weight} {c.rounding}"
)
def test_no_kernel_moves_five_percent_more_than_its_floor(case: moved.Case) -> None:
    row = moved.count(case, (256, 512))
    assert 1 <= row["over_floor"] <= 1.05


def test_one_launch_reads_weights_and_steps_again_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, cols, rank = 40, 144, 16
    piece = random_piece(generator, (rows, cols), 0, 1, torch.float32, torch.float32)
    with counted({}) as traffic:
        onesided.step(piece, torch.eye(cols, rank), AdamW(lr=1e-3))
    weights = rows * cols
    assert traffic.moved("p") == 4 * 3 * weights
    assert traffic.moved("stash") == 4 * 3 * weights
    assert traffic.moved("g") == 4 * weights
    assert traffic.moved("m") == traffic.moved("v") == 4 * 2 * weights
    assert traffic.launches == {"onesided": 1}
