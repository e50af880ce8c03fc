"""Does work on a sketch deserve a kernel of its own? Bytes and time of each way to do it.

    python -m benchmarks.kernels.sketch --output benchmarks/kernels/results/sketch.json

Bytes, launches and arithmetic of plain torch are counted at the size of a large layer
(`benchmarks.kernels.counting`, torch's flop counter); what a kernel must move is computed from
shapes. CPU ratios are measured at a smaller size, in one run. docs/kernels.md tells what follows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.kernels import counting
from safeopt.environment import environment
from safeopt.files import write_json
from safeopt.geometry.blocks import LowRankBlock
from safeopt.geometry.compression import Factors, compress

EPSILON = 1e-2  # of the finite difference; any number costs the same

Way = Callable[..., Any]


@dataclass(frozen=True)
class Work:
    """One piece of work on the sketch of an m x n matrix.

    Attributes:
        name: what it computes.
        plain: the work in torch, as a formula.
        arguments: makes its tensors from (m, n) and a device.
        floor: bytes that a kernel of its own must move, from (m, n).
        library: other ways to say it in library calls, by name.
        compiles: False where `torch.compile` breaks the graph.
    """

    name: str
    plain: Way
    arguments: Callable[[tuple[int, int], str], tuple[Tensor, ...]]
    floor: Callable[[int, int], int]
    library: Mapping[str, Way] = field(default_factory=dict)
    compiles: bool = True


FULL = (4096, 4096)  # q_proj of Llama-3.1-8B
SMALL = (512, 512)


def works() -> list[Work]:
    """The work that a refresh and a forecast do on a sketch, matrix by matrix."""
    return [
        *(_gram_work(count, 8) for count in (16, 64, 512)),
        Work(
            "compression of 256 tokens to rank 8, 16 anchors",
            _compress,
            lambda shape, device: _factors(16, 256, shape, device),
            lambda m, n: 4 * 16 * (2 * 256 + 8) * (m + n),
            compiles=False,
        ),
        Work(
            "Frequent-Directions shrink, 128 to 64 rows",
            _shrink,
            lambda shape, device: (_matrix(128, shape[1], device),),
            lambda m, n: 4 * 5 * 64 * n,
        ),
        Work(
            "finite difference and its coefficients, 16 anchors of rank 8",
            _difference_then_coefficients,
            _difference_arguments,
            lambda m, n: 4 * (2 * m * n + 16 * 8 * (m + n) + 16),
            {"two coefficients": _coefficients_then_difference},
        ),
    ]


def _gram_work(count: int, rank: int) -> Work:
    return Work(
        f"Gram matrix, {count} anchors of rank {rank}",
        _gram,
        lambda shape, device: _factors(count, rank, shape, device),
        lambda m, n: 4 * (count * rank * (m + n) + count * count),
        {"row blocks": lambda left, right: LowRankBlock(left, right).gram()},
    )


def _gram(left: Tensor, right: Tensor) -> Tensor:
    count, rank, _ = left.shape
    tall, wide = left.flatten(0, 1), right.flatten(0, 1)
    return ((tall @ tall.T) * (wide @ wide.T)).view(count, rank, count, rank).sum((1, 3))


def _compress(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    (made,) = compress([Factors(left, right)], rank=8)
    return made.left, made.right


def _shrink(rows: Tensor) -> Tensor:
    """Frequent Directions: half of the rows, less the largest singular value that is dropped."""
    half = len(rows) // 2
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept, dropped = values[half:], values[half - 1].clamp(min=0)
    scale = ((kept - dropped).clamp(min=0) / kept).sqrt()
    shrunk: Tensor = (vectors[:, half:] * scale).T @ rows
    return shrunk


def _coefficients(step: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return LowRankBlock(left, right).coefficients(step)


def _difference_then_coefficients(
    above: Tensor, below: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    return _coefficients((above - below) / (2 * EPSILON), left, right)


def _coefficients_then_difference(
    above: Tensor, below: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    """The same by linearity: the difference itself is never formed."""
    up, down = (_coefficients(g, left, right) for g in (above, below))
    return (up - down) / (2 * EPSILON)


def _matrix(rows: int, columns: int, device: str) -> Tensor:
    # Never computed with at full size: the count needs shapes, and nobody touches the memory.
    if rows * columns > 1 << 22:
        return torch.empty(rows, columns, device=device)
    return torch.randn(rows, columns, device=device)


def _factors(count: int, rank: int, shape: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    m, n = shape
    return (
        _matrix(count * rank, m, device).view(count, rank, m),
        _matrix(count * rank, n, device).view(count, rank, n),
    )


def _difference_arguments(shape: tuple[int, int], device: str) -> tuple[Tensor, ...]:
    m, n = shape
    return _matrix(m, n, device), _matrix(m, n, device), *_factors(16, 8, shape, device)


def count(work: Work, shape: tuple[int, int] = FULL) -> dict[str, Any]:
    """Launches, bytes and arithmetic of every way to do the work."""
    meta = work.arguments(shape, "meta")
    ways = {"eager": counting.eager(work.plain, *meta)}
    if work.compiles:
        ways["compiled"] = counting.compiled(work.plain, *work.arguments(shape, "cpu"))
    ways |= {name: counting.eager(way, *meta) for name, way in work.library.items()}
    with FlopCounterMode(display=False) as counter:
        work.plain(*meta)
    return {
        "work": work.name,
        "floor_bytes": work.floor(*shape),
        "product_flops": counter.get_total_flops(),
        "ways": {name: asdict(cost) for name, cost in ways.items()},
    }


def cpu_ratios(work: Work, repeats: int, shape: tuple[int, int] = SMALL) -> dict[str, float]:
    """Seconds of the other ways over eager torch, medians of paired repeats."""
    arguments = work.arguments(shape, "cpu")
    ways: dict[str, Way] = {"eager": work.plain}
    if work.compiles:
        ways["compiled"] = torch.compile(work.plain, dynamic=False)
    ways |= work.library
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(*arguments)
            if repeat:  # the first turn compiles
                times[name].append(time.perf_counter() - start)
    return {
        name: statistics.median(a / b for a, b in zip(took, times["eager"], strict=True))
        for name, took in times.items()
    }


def main(argv: Sequence[str]) -> int:
    """Parse the command line, count and measure, write the result file."""
    parser = argparse.ArgumentParser(description="Count what work on a sketch costs.")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    rows = []
    for work in works():
        rows.append(count(work) | {"cpu_ratio": cpu_ratios(work, options.repeats)})
        print(rows[-1])
    result = {
        "command": f"python -m benchmarks.kernels.sketch {' '.join(argv)}",
        "environment": environment(),
        "full": FULL,
        "small": SMALL,
        "works": rows,
    }
    write_json(options.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
