"""The two-pass step on CPUs, in C++: fp32 matrices, the step in the weights.

``cpp/`` has the code, `builds` says which of it a CPU takes, and `build` compiles that at the first
call (a few seconds, once).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, byref, c_double, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from safeopt_kernels import build
from safeopt_kernels.settings import AdamW, scalars
from safeopt_kernels.table import Piece

_FLAGS = (
    "-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC",
)  # fmt: skip
_WIDE = ("avx512f", "avx512bw", "avx512vl", "avx512dq")


@dataclass(frozen=True)
class Build:
    """Code for one kind of CPU.

    Attributes:
        source: file in ``cpp/``.
        instructions: what the CPU must know, as the compiler calls it.
        more: other flags of the compiler.
        rounds: whether numbers enter products as bf16; sums are float32 in any case.
    """

    source: str
    instructions: tuple[str, ...]
    more: tuple[str, ...] = ()
    rounds: bool = False

    def missing(self, cpu: set[str]) -> list[str]:
        """Instructions that a CPU with these flags of ``/proc/cpuinfo`` lacks."""
        # Linux writes avx512_bf16 and amx_tile, compilers avx512bf16 and amx-tile.
        known = {name.replace("_", "") for name in cpu}
        return [name for name in self.instructions if name.replace("-", "") not in known]

    def compile(self) -> ctypes.CDLL:
        """Build and load it.

        Raises:
            RuntimeError: there is no compiler, it fails, or the system withholds registers.
            OSError: the cache cannot be written, or the library cannot be loaded.
        """
        rounds = ("-DSAFEOPT_BF16",) if self.rounds else ()
        flags = (*_FLAGS, *(f"-m{name}" for name in self.instructions), *self.more, *rounds)
        library = build.library(Path(__file__).parent / "cpp" / self.source, flags)
        if library.prepare() != 0:
            raise RuntimeError("the operating system does not hand out AMX tiles")
        return library


_LONG = ("-mprefer-vector-width=512",)
AMX = Build("amx.cpp", ("fma", *_WIDE, "amx-tile", "amx-bf16"))
AMX_BF16 = replace(AMX, rounds=True)
AVX512 = Build("vectors.cpp", ("fma", *_WIDE), _LONG)
AVX512_BF16 = Build("vectors.cpp", ("fma", *_WIDE, "avx512bf16"), _LONG, rounds=True)
AVX2 = Build("vectors.cpp", ("fma", "avx2"))
_BUILDS = (AMX_BF16, AVX512_BF16, AMX, AVX512, AVX2)  # the fastest first


class _Scalars(ctypes.Structure):
    _fields_ = [(f"scalar{i}", c_float) for i in range(8)]


def obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Why these tensors cannot be stepped natively, or None; builds the code if nothing else is.

    Args:
        tensors: whatever goes into the call.
    """
    for tensor in tensors:  # one loop: a step asks this of every tensor
        if not tensor.is_cpu:
            return "a tensor is not on the CPU"
        if tensor.dtype != torch.float32:
            return "a tensor is not float32"
        if not tensor.is_contiguous():
            return "a tensor is not contiguous"
    return _obstacle_of_machine(may_round())


@functools.cache
def _obstacle_of_machine(rounding: bool) -> str | None:
    try:
        _fastest(rounding)
    except (RuntimeError, OSError) as error:
        return str(error)
    return None


def _cpu_flags() -> set[str]:
    """What Linux says that the CPU can do; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def may_round() -> bool:
    """Whether torch has been told to take float32 matrix products in bf16 on CPUs.

    ``torch.set_float32_matmul_precision("medium")`` says so; torch's default is not to.
    """
    chosen = getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(
        chosen, "fp32_precision", None
    )  # torch 2.9; the older getter may raise there
    if precision is None:
        return torch.get_float32_matmul_precision() == "medium"
    return bool(precision == "bf16")


def builds(rounding: bool) -> list[Build]:
    """The builds that this CPU can run, the fastest first.

    Args:
        rounding: also those whose products are of numbers rounded to bf16.
    """
    cpu = _cpu_flags()
    return [one for one in _BUILDS if (rounding or not one.rounds) and not one.missing(cpu)]


def _library() -> ctypes.CDLL:
    return _fastest(may_round())


@functools.cache
def _fastest(rounding: bool) -> ctypes.CDLL:
    """The fastest that compiles here.

    Raises:
        RuntimeError: there is none, or none compiles.
        OSError: the cache cannot be written, or the library cannot be loaded.
    """
    candidates = builds(rounding)
    if not candidates:
        raise RuntimeError(f"the CPU lacks {', '.join(_BUILDS[-1].missing(_cpu_flags()))}")
    for candidate in candidates[:-1]:
        with contextlib.suppress(RuntimeError):  # tiles withheld, or an old compiler
            return declared(candidate.compile())
    return declared(candidates[-1].compile())


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, told the types of its functions' arguments."""
    matrices, double = POINTER(c_int64), POINTER(c_double)
    library.propose.argtypes = [
        matrices, c_int64, c_int64, POINTER(_Scalars), c_int, double, double
    ]  # fmt: skip
    library.propose.restype = None
    library.apply.argtypes = [matrices, c_int64, c_int64, POINTER(c_float), c_int]
    library.apply.restype = None
    library.all_finite.argtypes = [POINTER(c_void_p), POINTER(c_int64), c_int64, c_int]
    return library


def propose(pieces: Sequence[Piece], count: int, adamw: AdamW) -> tuple[Tensor, Tensor]:
    """Update m and v and the weights, p <- p + s.

    Args:
        pieces: matrices with g, m and v and maybe factors.
        count: N.
        adamw: scalars of the step.

    Returns:
        c = G s, (N,), and ||s||^2, float64, of the step as it was stored.
    """
    c = torch.zeros(count, dtype=torch.float64)
    squared_norm = c_double()
    _library().propose(
        _matrices(pieces), len(pieces), count, byref(_Scalars(*scalars(adamw))),
        torch.get_num_threads(), ctypes.cast(c.data_ptr(), POINTER(c_double)), byref(squared_norm),
    )  # fmt: skip
    return c, torch.tensor(squared_norm.value, dtype=torch.float64)


def apply(pieces: Sequence[Piece], weights: Tensor) -> None:
    """Write p <- p - sum_i a_i G_i.

    Args:
        pieces: matrices, maybe with factors.
        weights: a, (N,).
    """
    narrow = (c_float * len(weights))(*weights.tolist())
    matrices, threads = _matrices(pieces), torch.get_num_threads()
    _library().apply(matrices, len(pieces), len(weights), narrow, threads)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is infinite or NaN; one pass over memory, nothing written.

    Args:
        tensors: any for which `obstacle` is None.
    """
    pointers = (c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    sizes = (c_int64 * len(tensors))(*(t.numel() for t in tensors))
    return bool(_library().all_finite(pointers, sizes, len(tensors), torch.get_num_threads()))


def _matrices(pieces: Sequence[Piece]) -> ctypes.Array[c_int64]:
    """What the C++ calls a Matrix, of each: six addresses and three sizes, all of 64 bits."""
    words = [word for piece in pieces for word in _words(piece)]
    return (c_int64 * len(words))(*words)


def _words(piece: Piece) -> list[int]:
    p, left, right = piece.p, piece.left, piece.right
    rank = 0 if left is None else left.shape[0] * left.shape[1]
    tensors = (p, piece.g, piece.m, piece.v, left, right)
    return [*[0 if t is None else t.data_ptr() for t in tensors], *p.shape, rank]
