"""Launches of K1. The tensors must have been checked: see `safeopt_kernels.ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from safeopt_kernels import specialisations
from safeopt_kernels.settings import AdamW, Rounding, Seed, scalars
from safeopt_kernels.table import Piece, pointer_table, tile_table


def propose(
    pieces: Sequence[Piece], count: int, adamw: AdamW, *, backend: str = "cuda"
) -> tuple[Tensor, Tensor]:
    """Pass 1 of a list of matrices of one kind: update m and v, write the steps.

    Returns:
        c = G s, (count,) float64, and ||s||^2, float64.
    """
    first = pieces[0]
    assert first.m is not None
    device = first.p.device
    spec = specialisations.propose(
        first.p.dtype,
        first.m.dtype,
        _factor_dtype(pieces),
        aligned=all(piece.is_aligned() for piece in pieces),
        in_place=first.step is None,
        backend=backend,
        exact_dot=is_interpreted(),
    )
    tiles = tile_table((p.shape for p in pieces), _block(spec), device)
    partials = torch.empty(len(tiles), count, dtype=torch.float32, device=device)
    norms = torch.empty(len(tiles), dtype=torch.float32, device=device)
    if len(tiles):
        spec.kernel[(len(tiles),)](
            pointer_table(pieces, device),
            tiles,
            partials,
            norms,
            count,
            *scalars(adamw),
            **spec.constants,
            num_warps=spec.warps,
        )
    return partials.sum(0, dtype=torch.float64), norms.sum(dtype=torch.float64)


def apply(
    pieces: Sequence[Piece],
    weights: Tensor,
    rounding: Rounding = "nearest",
    seed: Seed | None = None,
    *,
    backend: str = "cuda",
) -> None:
    """Pass 2 of a list of matrices of one kind: p <- p + s - sum_i a_i G_i."""
    first = pieces[0]
    spec = specialisations.apply(
        first.p.dtype,
        _factor_dtype(pieces),
        rounding,
        aligned=all(piece.is_aligned() for piece in pieces),
        in_place=first.step is None,
        backend=backend,
    )
    device = first.p.device
    tiles = tile_table((p.shape for p in pieces), _block(spec), device)
    seed = seed or Seed()
    if len(tiles):
        spec.kernel[(len(tiles),)](
            pointer_table(pieces, device),
            tiles,
            weights.to(device, torch.float32),
            len(weights),
            seed.seed,
            seed.step,
            **spec.constants,
            num_warps=spec.warps,
        )


def is_interpreted() -> bool:
    """True if this process runs kernels in Triton's interpreter, which works on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def _factor_dtype(pieces: Sequence[Piece]) -> torch.dtype:
    return next((p.left.dtype for p in pieces if p.left is not None), torch.float32)


def _block(spec: specialisations.Specialisation) -> tuple[int, int]:
    return spec.constants["BM"], spec.constants["BN"]
