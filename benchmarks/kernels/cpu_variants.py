"""Ways to take a guarded AdamW step on a CPU, timed in turns beside fused AdamW without a guard.

    python -m benchmarks.kernels.cpu_variants --output benchmarks/kernels/results/cpu_variants.json

Square fp32 matrices with N q = 64 factor rows each. Every way updates the moments, works out
c = G s and subtracts G^T a; what differs is where the step waits and in which precision the two
products are taken. Seconds are those of the processor, summed over threads, which a busy machine
disturbs less than those of the clock. The coefficients' error is that against float64, relative
to ||s|| times the factors' norms.

AdamW's coefficients follow from no recurrence: s is not linear in the moments, so that c of the
next step cannot be had from those of m and g.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from safeopt.environment import environment
from safeopt.files import write_json
from safeopt_kernels import dispatch, ops
from safeopt_kernels import native as kernels
from safeopt_kernels.settings import AdamW

ADAMW = AdamW(lr=1e-6, weight_decay=0.0, step=3)
BF16 = torch.bfloat16
BASE = "fused AdamW, no guard"
NATIVE = "strips in C++"
NATIVE_BF16 = "strips in C++, bf16 products"
LOOK = "gradients looked at"


@dataclass
class Problem:
    """Matrices and factors.

    Attributes:
        p: weights; g, m and v beside them.
        g: gradients.
        m: first moments.
        v: second moments.
        left: factors (N, q, width).
        right: factors (N, q, width).
        weights: a, (N,).
    """

    p: list[Tensor]
    g: list[Tensor]
    m: list[Tensor]
    v: list[Tensor]
    left: list[Tensor]
    right: list[Tensor]
    weights: Tensor

    @classmethod
    def random(cls, layers: int, width: int, anchors: int, rank: int) -> Problem:
        """Random weights, gradients and factors."""

        def stack(*shape: int) -> list[Tensor]:
            return [torch.randn(shape) for _ in range(layers)]

        square, factor = (width, width), (anchors, rank, width)
        v = [torch.rand(square).mul_(1e-2) for _ in range(layers)]
        return cls(
            stack(*square), stack(*square), stack(*square), v, stack(*factor), stack(*factor),
            torch.full((anchors,), 1e-9, dtype=torch.float64),
        )  # fmt: skip

    def flat(self, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
        """Factors as (N q, width) matrices."""
        pairs = zip(self.left, self.right, strict=True)
        return [(x.flatten(0, 1).to(dtype), y.flatten(0, 1).to(dtype)) for x, y in pairs]


def fused(problem: Problem, at: slice = slice(None)) -> None:
    """AdamW alone, by torch's fused kernel."""
    lists = (problem.p[at], problem.g[at], problem.m[at], problem.v[at])
    torch._fused_adamw_(
        *lists, [], [torch.tensor(float(ADAMW.step))] * len(lists[0]), lr=ADAMW.lr,
        beta1=ADAMW.beta1, beta2=ADAMW.beta2, weight_decay=0.0, eps=ADAMW.eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip


def whole_matrices(problem: Problem, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy, the fused step and a difference per matrix, then the two products."""
    scratch, factors = torch.empty_like(problem.p[0]), problem.flat(dtype)
    total = torch.zeros(len(problem.weights), dtype=torch.float64)
    for i, p in enumerate(problem.p):
        scratch.copy_(p)
        fused(problem, slice(i, i + 1))
        torch.sub(p, scratch, out=scratch)
        left, right = factors[i]
        image = left @ scratch.to(dtype)
        total += (image * right).view(len(total), -1).sum(1, dtype=torch.float64)
    _subtract(problem, dtype)
    return total


def _subtract(problem: Problem, dtype: torch.dtype) -> None:
    scale = problem.weights.float().repeat_interleave(problem.left[0].shape[1])[:, None]
    for p, (left, right) in zip(problem.p, problem.flat(), strict=True):
        scaled = left * scale
        if dtype == torch.float32:
            p.addmm_(scaled.T, right, alpha=-1)
        else:
            scaled, right = scaled.to(dtype), right.to(dtype)
            for rows in range(0, len(p), 256):
                p[rows : rows + 256] -= scaled[:, rows : rows + 256].T @ right


def bf16_products(problem: Problem) -> Tensor:
    """The same with both products in bf16."""
    return whole_matrices(problem, BF16)


@contextmanager
def rounding() -> Iterator[None]:
    """Let oneDNN and the C++ multiply float32 matrices in bf16 inside."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def bf16_mode(problem: Problem) -> Tensor:
    """The same in fp32 while oneDNN may multiply in bf16 inside."""
    with rounding():
        return whole_matrices(problem)


def row_blocks(problem: Problem) -> Tensor:
    """The operators' plain CPU path: blocks of rows that stay in the cache, fp32."""
    return _by_operators(problem, "reference")


def native(problem: Problem) -> Tensor:
    """The operators in C++: with AMX tiles in bf16 products of halves, else in fp32."""
    return _by_operators(problem, "native")


def native_bf16(problem: Problem) -> Tensor:
    """The same while they may round what they multiply to bf16."""
    with rounding():
        return native(problem)


def _by_operators(problem: Problem, mode: str) -> Tensor:
    lists = (problem.p, problem.g, problem.m, problem.v, problem.left, problem.right)
    with patch.dict("os.environ", {dispatch.VARIABLE: mode}):
        c, _ = ops.adamw_propose_(*lists, len(problem.weights), ADAMW)
        ops.low_rank_apply_(problem.p, problem.left, problem.right, problem.weights)
    return c


def batched(problem: Problem) -> Tensor:
    """All steps kept in one buffer, and one batched product for all matrices."""
    steps = torch.stack(problem.p)
    fused(problem)
    torch.sub(torch.stack(problem.p), steps, out=steps)
    left = torch.stack([x.flatten(0, 1) for x in problem.left])
    right = torch.stack([x.flatten(0, 1) for x in problem.right])
    image = torch.bmm(left, steps)
    count = len(problem.weights)
    parts: Tensor = image.mul_(right).unflatten(1, (count, -1))
    c = parts.sum((0, 2, 3), dtype=torch.float64)
    _subtract(problem, torch.float32)
    return c


def _elementwise(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
    m.mul_(ADAMW.beta1).add_(g, alpha=1 - ADAMW.beta1)
    v.mul_(ADAMW.beta2).addcmul_(g, g, value=1 - ADAMW.beta2)
    step = -ADAMW.step_size * m / (v.sqrt() / ADAMW.root_correction + ADAMW.eps)
    moved = p + step
    stored: Tensor = (moved - p).to(BF16)
    p.copy_(moved)
    return stored


def _minus(p: Tensor, product: Tensor) -> None:
    p.sub_(product)


_compiled_step = torch.compile(_elementwise, dynamic=False)
_compiled_minus = torch.compile(_minus, dynamic=False)


def compiled(problem: Problem, rows: int = 512) -> Tensor:
    """One compiled loop per block of rows that hands over the step in bf16; bf16 products."""
    scale = problem.weights.float().repeat_interleave(problem.left[0].shape[1])[:, None]
    total = torch.zeros(len(problem.weights), dtype=torch.float64)
    factors = problem.flat(BF16)
    for i, (left, right) in enumerate(factors):
        lists = (problem.p[i], problem.g[i], problem.m[i], problem.v[i])
        for start in range(0, len(lists[0]), rows):
            at = slice(start, start + rows)
            image = left[:, at] @ _compiled_step(*(t[at] for t in lists))
            total += (image * right).view(len(total), -1).sum(1, dtype=torch.float64)
    for p, (left, right) in zip(problem.p, factors, strict=True):
        scaled = (left * scale).to(BF16)
        for start in range(0, len(p), rows):
            at = slice(start, start + rows)
            _compiled_minus(p[at], scaled[:, at].T @ right)
    return total


VARIANTS: dict[str, Callable[[Problem], Tensor | None]] = {
    BASE: fused,
    "whole matrices, fp32": whole_matrices,
    "blocks of rows, fp32": row_blocks,
    "one batched product, fp32": batched,
    "whole matrices, oneDNN's bf16 mode": bf16_mode,
    "whole matrices, bf16 products": bf16_products,
    "compiled blocks, bf16 products": compiled,
    NATIVE: native,
    NATIVE_BF16: native_bf16,
}


def parts_of(problem: Problem) -> dict[str, Callable[[], object]]:
    """What the step in C++ consists of, each beside the plain pass over the same bytes."""
    p, factors = problem.p, (problem.left, problem.right)
    lists = (p, problem.g, problem.m, problem.v)
    none = ([x[:, :0] for x in problem.left], [x[:, :0] for x in problem.right])
    count = len(problem.weights)

    def propose() -> object:
        return ops.adamw_propose_(*lists, *factors, count, ADAMW)

    def apply() -> None:
        ops.low_rank_apply_(p, *factors, problem.weights)

    return {
        LOOK: lambda: kernels.all_finite(problem.g),
        "pass 1 without factors": lambda: ops.adamw_propose_(*lists, *none, count, ADAMW),
        "pass 1": propose,
        "pass 1, bf16 products": rounding()(propose),
        "p <- p + 0": lambda: torch._foreach_add_(p, 0.0),
        "pass 2": apply,
        "pass 2, bf16 products": rounding()(apply),
    }


def measure_parts(problem: Problem, repeats: int) -> dict[str, float]:
    """Seconds of the clock of every part over those of fused AdamW, medians of paired turns."""
    parts, ratios = parts_of(problem), dict[str, list[float]]()
    with patch.dict("os.environ", {dispatch.VARIABLE: "native"}):
        for turn in range(repeats + 2):
            base = _clocked(lambda: fused(problem))
            for name, part in parts.items():
                ratio = _clocked(part) / base
                if turn > 1:
                    ratios.setdefault(name, []).append(ratio)
    return {name: statistics.median(values) for name, values in ratios.items()}


def _clocked(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def error_of(variant: Callable[[Problem], Tensor | None], problem: Problem) -> float:
    """Error of the coefficients, against the step that was stored; one step is taken."""
    before = [p.double() for p in problem.p]
    keep, problem.weights = problem.weights, torch.zeros_like(problem.weights)
    c = variant(problem)
    problem.weights = keep
    assert c is not None
    truth, scale = torch.zeros_like(c), 0.0
    for i, p in enumerate(problem.p):
        left, right = problem.left[i].double(), problem.right[i].double()
        step = p.double() - before[i]
        truth += ((left @ step) * right).sum((1, 2))
        scale += float((step.norm() * left.norm() * right.norm()) ** 2)
    return float((c - truth).norm() / scale**0.5)


def measure(problem: Problem, repeats: int, ways: Sequence[str]) -> dict[str, Any]:
    """Seconds of every way in every turn; the order turns round, the first turns warm up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 2):
        for name in list(ways) if turn % 2 else list(reversed(ways)):
            start = time.process_time()
            VARIANTS[name](problem)
            if turn > 1:
                times[name].append(time.process_time() - start)
    base = times[BASE]
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, base, strict=True))
        for name, values in times.items()
    }
    errors = {name: error_of(VARIANTS[name], problem) for name in ways if name != BASE}
    return {"seconds": times, "over_fused": ratios, "coefficient_error": errors}


def main(argv: Sequence[str]) -> int:
    """Parse the command line, measure, write the result file."""
    parser = argparse.ArgumentParser(description="Time ways to take a guarded step on a CPU.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--without", nargs="*", choices=list(VARIANTS)[1:], default=[])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        ways = [name for name in VARIANTS if name not in args.without]
        problem = Problem.random(args.layers, args.width, 8, 8)
        obstacle = kernels.obstacle(problem.p)
        if obstacle is not None:
            print(f"left out: {NATIVE} ({obstacle})")
            ways = [name for name in ways if not name.startswith(NATIVE)]
        found = measure(problem, args.repeats, ways)
        if NATIVE in ways:
            found["parts_over_fused"] = measure_parts(problem, 4 * args.repeats)
    command = f"python -m benchmarks.kernels.cpu_variants {' '.join(argv)}"
    write_json(args.output, {"command": command, "environment": environment(), **found})
    for name, ratio in found["over_fused"].items():
        print(f"{name:40s} {ratio:6.2f}  {found['coefficient_error'].get(name, 0.0):.1e}")
    for name, ratio in found.get("parts_over_fused", {}).items():
        print(f"  {name:38s} {ratio:6.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
