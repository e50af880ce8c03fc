"""The two-pass step on CPUs with AMX tiles, in C++: fp32 matrices, the step in the weights.

``amx/`` has the code, `build` compiles it at the first call (a few seconds, once).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, byref, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from safeopt_kernels import build
from safeopt_kernels.settings import AdamW, scalars
from safeopt_kernels.table import Piece

_SOURCE = Path(__file__).parent / "amx" / "amx.cpp"
_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16")
_TILES = ("amx-tile", "amx-bf16")
_FLAGS = (
    "-std=c++17", "-O3", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC", "-mfma",
    *(f"-m{name}" for name in (*_INSTRUCTIONS, *_TILES)),
)  # fmt: skip
_IN_CPUINFO = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_tile", "amx_bf16"}


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("p", "g", "m", "v", "left", "right")),
        *((name, c_int64) for name in ("rows", "cols", "rank")),
    ]


class _Scalars(ctypes.Structure):
    _fields_ = [(f"scalar{i}", c_float) for i in range(8)]


def obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Why these tensors cannot be stepped natively, or None; builds the code if nothing else is.

    Args:
        tensors: whatever goes into the call.
    """
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "a tensor is not on the CPU"
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        return "a tensor is not float32"
    if not all(tensor.is_contiguous() for tensor in tensors):
        return "a tensor is not contiguous"
    return _obstacle_of_machine()


@functools.cache
def _obstacle_of_machine() -> str | None:
    missing = sorted(_IN_CPUINFO - _cpu_flags())
    if missing:
        return f"the CPU lacks {', '.join(missing)}"
    try:
        _library()
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


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.library(_SOURCE, _FLAGS)
    if library.prepare() != 0:
        raise RuntimeError("the operating system does not hand out AMX tiles")
    matrices, double = POINTER(_Matrix), POINTER(c_double)
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


def _matrices(pieces: Sequence[Piece]) -> ctypes.Array[_Matrix]:
    return (_Matrix * len(pieces))(*(_matrix(piece) for piece in pieces))


def _matrix(piece: Piece) -> _Matrix:
    tensors = (piece.p, piece.g, piece.m, piece.v, piece.left, piece.right)
    rank = 0 if piece.left is None else piece.left.shape[0] * piece.left.shape[1]
    return _Matrix(*(None if t is None else t.data_ptr() for t in tensors), *piece.shape, rank)
