"""Random matrices for the kernels, and how exactly the interpreter stores each dtype.

It cuts bfloat16 off instead of rounding it: an error of up to one unit in the last place.
"""

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
    *,
    in_place: bool = False,
    moment: torch.dtype = torch.float32,
) -> Piece:
    """A matrix whose outputs are poisoned with NaN; ``rank`` 0 has no factors."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    rows, cols = shape
    return Piece(
        p=normal(rows, cols).to(weight),
        step=None if in_place else torch.full(shape, torch.nan, dtype=weight),
        g=normal(rows, cols).to(weight),
        m=(0.1 * normal(rows, cols)).to(moment),
        v=(0.01 * normal(rows, cols).square()).to(moment),
        left=normal(count, rank, rows).to(factor) if rank else None,
        right=normal(count, rank, cols).to(factor) if rank else None,
        compensation=1e-3 * normal(rows, cols).to(weight),
        index=index,
    )
