"""Random matrices for the kernels, and what the interpreter makes of bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from safeopt_kernels.table import Piece

ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def random_piece(
    generator: torch.Generator,
    shape: tuple[int, int],
    rank: int,
    count: int,
    weight: torch.dtype,
    factor: torch.dtype,
    index: int = 0,
) -> Piece:
    """A matrix whose outputs are poisoned with NaN; ``rank`` 0 has no factors."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    rows, cols = shape
    return Piece(
        p=normal(rows, cols).to(weight),
        step=torch.full(shape, torch.nan, dtype=weight),
        g=normal(rows, cols).to(weight),
        m=0.1 * normal(rows, cols),
        v=0.01 * normal(rows, cols).square(),
        left=normal(count, rank, rows).to(factor) if rank else None,
        right=normal(count, rank, cols).to(factor) if rank else None,
        compensation=1e-3 * normal(rows, cols).to(weight),
        index=index,
    )


def as_stored(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 as the interpreter stores it: it cuts bfloat16 off, and rounds the others."""
    if dtype == torch.bfloat16:
        return (exact.float().view(torch.int32) & -65536).view(torch.float32)
    return exact.to(dtype).float()
