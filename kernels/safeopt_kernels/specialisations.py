"""Every compiled form of every kernel, declared in one place.

A launch looks its constants up here, and so does whoever compiles the kernels ahead of time or
runs them under an instrumented interpreter: what is checked is what is launched. Ranks, sizes, the
number of matrices and the number N of low-rank parts are runtime values; only dtypes, alignment and
rounding make a new binary. Nothing is autotuned: the kernels write in place, so trying a second
tiling would take the step twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from safeopt_kernels import adamw_lowrank, adamw_onesided
from safeopt_kernels.settings import ROUNDINGS, Rounding

TRITON_DTYPES: Mapping[torch.dtype, tl.dtype] = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
PARTS = 64  # low-rank parts whose sums a program of `propose` keeps at once
FLOATS = ("decay", "step_size", "beta1", "rest1", "beta2", "rest2", "root_correction", "eps")


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


# Chosen so that no form on any target spills registers: the benchmarks hold it.
_TILINGS = {
    ("propose", "cuda"): Tiling(rows=64, cols=128, ranks=32, warps=8),
    ("propose", "hip"): Tiling(rows=64, cols=128, ranks=16, warps=8),
    ("apply", "cuda"): Tiling(rows=64, cols=128, ranks=32, warps=8),
    ("apply", "hip"): Tiling(rows=64, cols=128, ranks=32, warps=8),
    ("onesided", "cuda"): Tiling(rows=16, cols=64, ranks=64, warps=8),
    ("onesided", "hip"): Tiling(rows=16, cols=64, ranks=64, warps=4),
}
# Narrow loads want a 64-bit address for every element: fewer of them per thread.
_NARROW_TILINGS = {
    ("propose", "cuda"): Tiling(rows=32, cols=128, ranks=32, warps=8),
    ("apply", "cuda"): Tiling(rows=32, cols=128, ranks=32, warps=8),
    ("onesided", "cuda"): Tiling(rows=16, cols=64, ranks=32, warps=8),
}


@dataclass(frozen=True)
class Specialisation:
    """One compiled form of a kernel.

    Attributes:
        name: unique and readable, such as "propose-bfloat16-float32-float32-aligned".
        kernel: the Triton function.
        signature: type of each runtime argument in order, as Triton writes them ("*i64", "fp32").
        constants: value of each constexpr argument.
        warps: warps of a program.
        bytes_per_parameter: what one launch must move per weight, factors left out, and what a
            program reads again counted once.
        divisible: integer arguments that are multiples of 16, beside the pointers.
        backend: "cuda" or "hip".
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    bytes_per_parameter: float
    divisible: tuple[str, ...] = ()
    backend: str = "cuda"

    @property
    def full_signature(self) -> dict[str, str]:
        """The signature with constexpr arguments included, as `triton.compiler.ASTSource` wants."""
        return dict(self.signature) | dict.fromkeys(self.constants, "constexpr")

    @property
    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        """What the launcher finds about the arguments at run time.

        That is divisibility by 16 and, on AMD's GPUs, that a tensor has less than 2 GiB.
        """
        any_address = self.kernel.do_not_specialize_on_alignment
        found = {}
        for position, name in enumerate(self.kernel.arg_names):
            is_pointer = self.signature.get(name, "").startswith("*")
            facts: list[list[Any]] = []
            if name in self.divisible or (is_pointer and name not in any_address):
                facts.append(["tt.divisibility", 16])
            if is_pointer and self.backend == "hip":
                facts.append(["tt.pointer_range", 32])
            if facts:
                found[position,] = facts
        return found


def dot_precision(backend: str) -> str:
    """How fp32 tile products use tensor cores: three products, about fp32's accuracy.

    Args:
        backend: "cuda" or "hip".
    """
    return "tf32x3" if backend == "cuda" else "bf16x3"


def propose(
    weight: torch.dtype,
    moment: torch.dtype,
    factor: torch.dtype,
    *,
    aligned: bool,
    in_place: bool = False,
    backend: str = "cuda",
    exact_dot: bool = False,
) -> Specialisation:
    """Pass 1 of K1.

    Args:
        weight: dtype of weights, gradients and steps.
        moment: dtype of the two moments.
        factor: dtype of the factors.
        aligned: every address and size is a multiple of 16.
        in_place: hand the step over in the weights, without a buffer.
        backend: "cuda" or "hip".
        exact_dot: multiply in fp32 also where both operands have the same 16-bit dtype. The
            products are the same numbers; the interpreter cannot multiply bfloat16.
    """
    same = weight == factor and not exact_dot
    tiling = _tiling("propose", backend, aligned)
    constants = {
        "WEIGHT": TRITON_DTYPES[weight],
        "MOMENT": TRITON_DTYPES[moment],
        "FACTOR": TRITON_DTYPES[factor],
        "DOT": TRITON_DTYPES[factor] if same else tl.float32,
        "PRECISION": dot_precision(backend),
        "IN_PLACE": in_place,
        "ALIGNED": aligned,
        "N": PARTS,
    } | _blocks(tiling)
    pointers = {"pieces": "*i64", "tiles": "*i32", "partials": "*fp32", "norms": "*fp32"}
    return Specialisation(
        name=_name(_handed("propose", in_place), weight, moment, factor, aligned=aligned),
        kernel=adamw_lowrank.propose,
        signature=pointers | {"count": "i32"} | dict.fromkeys(FLOATS, "fp32"),
        constants=constants,
        warps=tiling.warps,
        bytes_per_parameter=3 * weight.itemsize + 4 * moment.itemsize,
        backend=backend,
    )


def apply(
    weight: torch.dtype,
    factor: torch.dtype,
    rounding: Rounding,
    *,
    aligned: bool,
    in_place: bool = False,
    backend: str = "cuda",
) -> Specialisation:
    """Pass 2 of K1; arguments as for `propose`."""
    tiling = _tiling("apply", backend, aligned)
    constants = {
        "WEIGHT": TRITON_DTYPES[weight],
        "FACTOR": TRITON_DTYPES[factor],
        "PRECISION": dot_precision(backend),
        "ROUNDING": ROUNDINGS.index(rounding),
        "IN_PLACE": in_place,
        "ALIGNED": aligned,
    } | _blocks(tiling)
    return Specialisation(
        name=_name(_handed("apply", in_place), weight, factor, rounding, aligned=aligned),
        kernel=adamw_lowrank.apply,
        signature={
            "pieces": "*i64", "tiles": "*i32", "weights": "*fp32",
            "count": "i32", "seed": "i64", "step_number": "i64",
        },
        constants=constants,
        warps=tiling.warps,
        bytes_per_parameter=(2 + (not in_place) + 2 * (rounding == "kahan")) * weight.itemsize,
        backend=backend,
    )  # fmt: skip


def specialisations(backend: str = "cuda") -> Iterator[Specialisation]:
    """All forms that an operator can ask one backend for; all are compiled ahead of time.

    Moments or factors may be in the dtype of the weights; one of them is in fp32 at least.
    """
    for weight, aligned in itertools.product(TRITON_DTYPES, (True, False)):
        options: dict[str, Any] = {"aligned": aligned, "backend": backend}
        either = tuple(dict.fromkeys((torch.float32, weight)))
        for moment, factor in itertools.product(either, either):
            if torch.float32 not in (moment, factor):
                continue  # spills registers on sm_90, and operators refuse it
            for in_place in (False, True):
                yield propose(weight, moment, factor, in_place=in_place, **options)
            for rounding in roundings_of(weight):
                yield onesided(weight, moment, factor, rounding, **options)
        for factor in either:
            for rounding in roundings_of(weight):
                yield apply(weight, factor, rounding, **options)
            yield apply(weight, factor, "nearest", in_place=True, **options)


def onesided(
    weight: torch.dtype,
    moment: torch.dtype,
    factor: torch.dtype,
    rounding: Rounding = "nearest",
    *,
    aligned: bool = True,
    backend: str = "cuda",
    exact_dot: bool = False,
) -> Specialisation:
    """K2; arguments as for `propose`.

    Args:
        weight: dtype of weights, gradients and the stash.
        moment: dtype of the two moments.
        factor: dtype of the basis.
        rounding: how the weights are stored.
        aligned: every address and the number of columns are multiples of 16.
        backend: "cuda" or "hip".
        exact_dot: as for `propose`.
    """
    same = weight == factor and not exact_dot
    tiling = _tiling("onesided", backend, aligned)
    constants = {
        "DOT": TRITON_DTYPES[factor] if same else tl.float32,
        "PRECISION": dot_precision(backend),
        "ROUNDING": ROUNDINGS.index(rounding),
    } | _blocks(tiling)
    w, m, f = (f"*{TRITON_DTYPES[dtype].name}" for dtype in (weight, moment, factor))
    pointers = {"p": w, "g": w, "m": m, "v": m, "basis": f, "stash": w, "images": "*fp32"}
    integers = {"rows": "i32", "cols": "i32", "rank": "i32", "seed": "i64", "step_number": "i64"}
    return Specialisation(
        name=_name("onesided", weight, moment, factor, rounding, aligned=aligned),
        kernel=adamw_onesided.onesided if aligned else adamw_onesided.onesided_any,
        signature=pointers
        | {"compensation": w, "norms": "*fp32"}
        | integers
        | {"index": "i64"}
        | dict.fromkeys(FLOATS, "fp32"),
        constants=constants,
        warps=tiling.warps,
        bytes_per_parameter=(4 + 2 * (rounding == "kahan")) * weight.itemsize + 4 * moment.itemsize,
        divisible=("cols", "rank") if aligned else ("rank",),
        backend=backend,
    )


def roundings_of(weight: torch.dtype) -> tuple[Rounding, ...]:
    """The ways in which weights of a dtype can be stored."""
    return ROUNDINGS if weight == torch.bfloat16 else ("nearest", "kahan")


def _handed(kernel: str, in_place: bool) -> str:
    return f"{kernel}_in_place" if in_place else kernel


def _tiling(kernel: str, backend: str, aligned: bool) -> Tiling:
    usual = _TILINGS[kernel, backend]
    return usual if aligned else _NARROW_TILINGS.get((kernel, backend), usual)


def _blocks(tiling: Tiling) -> dict[str, int]:
    return {"BM": tiling.rows, "BN": tiling.cols, "BK": tiling.ranks}


def _name(kernel: str, *parts: object, aligned: bool) -> str:
    words = [str(part).removeprefix("torch.") for part in parts]
    return "-".join([kernel, *words, "aligned" if aligned else "any"])
