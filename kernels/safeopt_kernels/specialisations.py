"""Every compiled form of every kernel, declared in one place.

A launch looks its constants up here, and so does whoever compiles the kernels ahead of time or
runs them under an instrumented interpreter: what is checked is what is launched. Ranks, sizes and
the number of matrices are runtime values; only dtypes, alignment, rounding and the power of two
that holds the number N of low-rank parts make a new binary. Nothing is autotuned: the kernels write
in place, so trying a second tiling would take the step twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from safeopt_kernels import adamw_lowrank
from safeopt_kernels.settings import ROUNDINGS, Rounding

TRITON_DTYPES: Mapping[torch.dtype, tl.dtype] = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
SMALLEST_COUNT = 16
COUNTS = (16, 64)  # compiled ahead of time; other powers of two are compiled when they are met


@dataclass(frozen=True)
class Tiling:
    """How a kernel is cut into programs.

    Attributes:
        rows: rows of a tile, BM.
        cols: columns of a tile, BN.
        ranks: factor rows per tile product, BK.
        warps: warps of a program.
    """

    rows: int
    cols: int
    ranks: int
    warps: int


PROPOSE = Tiling(rows=64, cols=128, ranks=32, warps=8)
APPLY = Tiling(rows=64, cols=128, ranks=32, warps=8)


@dataclass(frozen=True)
class Specialisation:
    """One compiled form of a kernel.

    Attributes:
        name: unique and readable, such as "propose-bfloat16-float32-float32-16-aligned".
        kernel: the Triton function.
        signature: type of each runtime argument in order, as Triton writes them ("*i64", "fp32").
        constants: value of each constexpr argument.
        warps: warps of a program.
        bytes_per_parameter: what one launch must move per weight, factors left out.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    bytes_per_parameter: float

    @property
    def full_signature(self) -> dict[str, str]:
        """The signature with constexpr arguments included, as `triton.compiler.ASTSource` wants."""
        return dict(self.signature) | dict.fromkeys(self.constants, "constexpr")

    @property
    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        """Divisibility by 16 of every pointer argument, as the launcher finds it at run time."""
        names = self.kernel.arg_names
        return {
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in self.signature.items()
            if kind.startswith("*")
        }


def dot_precision(backend: str) -> str:
    """How fp32 tile products use tensor cores: three products, about fp32's accuracy.

    Args:
        backend: "cuda" or "hip".
    """
    return "tf32x3" if backend == "cuda" else "bf16x3"


def holding(count: int) -> int:
    """The least power of two, from 16, that holds ``count`` low-rank parts."""
    return max(SMALLEST_COUNT, 1 << (count - 1).bit_length())


def propose(
    weight: torch.dtype,
    moment: torch.dtype,
    factor: torch.dtype,
    count: int,
    *,
    aligned: bool,
    backend: str = "cuda",
    exact_dot: bool = False,
) -> Specialisation:
    """Pass 1 of K1.

    Args:
        weight: dtype of weights, gradients and steps.
        moment: dtype of the two moments.
        factor: dtype of the factors.
        count: N, number of low-rank parts.
        aligned: every address and size is a multiple of 16.
        backend: "cuda" or "hip".
        exact_dot: multiply in fp32 also where both operands have the same 16-bit dtype. The
            products are the same numbers; the interpreter cannot multiply bfloat16.
    """
    same = weight == factor and not exact_dot
    constants = {
        "WEIGHT": TRITON_DTYPES[weight],
        "MOMENT": TRITON_DTYPES[moment],
        "FACTOR": TRITON_DTYPES[factor],
        "DOT": TRITON_DTYPES[factor] if same else tl.float32,
        "PRECISION": dot_precision(backend),
        "ALIGNED": aligned,
        "N": holding(count),
    } | _blocks(PROPOSE)
    pointers = {"pieces": "*i64", "tiles": "*i32", "partials": "*fp32", "norms": "*fp32"}
    floats = (
        "decay", "step_size", "beta1", "rest1", "beta2", "rest2", "root_correction", "eps"
    )  # fmt: skip
    return Specialisation(
        name=_name("propose", weight, moment, factor, holding(count), aligned=aligned),
        kernel=adamw_lowrank.propose,
        signature=pointers | {"count": "i32"} | dict.fromkeys(floats, "fp32"),
        constants=constants,
        warps=PROPOSE.warps,
        bytes_per_parameter=3 * weight.itemsize + 4 * moment.itemsize,
    )


def apply(
    weight: torch.dtype,
    factor: torch.dtype,
    rounding: Rounding,
    *,
    aligned: bool,
    backend: str = "cuda",
) -> Specialisation:
    """Pass 2 of K1; arguments as for `propose`."""
    constants = {
        "WEIGHT": TRITON_DTYPES[weight],
        "FACTOR": TRITON_DTYPES[factor],
        "PRECISION": dot_precision(backend),
        "ROUNDING": ROUNDINGS.index(rounding),
        "ALIGNED": aligned,
    } | _blocks(APPLY)
    return Specialisation(
        name=_name("apply", weight, factor, rounding, aligned=aligned),
        kernel=adamw_lowrank.apply,
        signature={
            "pieces": "*i64", "tiles": "*i32", "weights": "*fp32",
            "count": "i32", "seed": "i64", "step_number": "i64",
        },
        constants=constants,
        warps=APPLY.warps,
        bytes_per_parameter=(5 if rounding == "kahan" else 3) * weight.itemsize,
    )  # fmt: skip


def specialisations(backend: str = "cuda") -> Iterator[Specialisation]:
    """All forms that are compiled ahead of time for one backend."""
    single, half = torch.float32, (torch.bfloat16, torch.float16)
    pairs = [(single, single)] + [(w, f) for w in half for f in (single, w)]
    for (weight, factor), aligned in itertools.product(pairs, (True, False)):
        for count in COUNTS:
            yield propose(weight, single, factor, count, aligned=aligned, backend=backend)
        for rounding in roundings_of(weight):
            yield apply(weight, factor, rounding, aligned=aligned, backend=backend)


def roundings_of(weight: torch.dtype) -> tuple[Rounding, ...]:
    """The ways in which weights of a dtype can be stored."""
    if weight == torch.bfloat16:
        return ROUNDINGS
    return ("nearest", "kahan") if weight == torch.float16 else ("nearest",)


def _blocks(tiling: Tiling) -> dict[str, int]:
    return {"BM": tiling.rows, "BN": tiling.cols, "BK": tiling.ranks}


def _name(kernel: str, *parts: object, aligned: bool) -> str:
    words = [str(part).removeprefix("torch.") for part in parts]
    return "-".join([kernel, *words, "aligned" if aligned else "any"])
