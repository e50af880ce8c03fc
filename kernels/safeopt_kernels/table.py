"""Lists of matrices as the kernels read them: a row of pointers and sizes each, and their tiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = (
    "p", "g", "m", "v", "step", "left", "right", "compensation",  # addresses
    "rows", "cols", "rank", "index",
)  # fmt: skip
ALIGNMENT = 16


@dataclass  # not a frozen one: a step makes hundreds, and those take twice as long
class Piece:
    """One matrix of a list; the tensors that a pass does not use are None.

    Attributes:
        p: weights, (rows, cols).
        step: dtype of p, (rows, cols); None hands the step over in the weights themselves.
        g: gradient, dtype of p, (rows, cols).
        m: first moment, (rows, cols).
        v: second moment, dtype of m, (rows, cols).
        left: factors (N, q, rows), or None for a matrix without a low-rank part.
        right: factors (N, q, cols).
        compensation: dtype of p, (rows, cols), for Kahan summation.
        index: number of the matrix in its list; part of the seed of stochastic rounding.
    """

    p: Tensor
    step: Tensor | None = None
    g: Tensor | None = None
    m: Tensor | None = None
    v: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    compensation: Tensor | None = None
    index: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, cols = self.p.shape
        return rows, cols

    def row(self) -> list[int]:
        """The table row of this matrix, in the order of `COLUMNS`."""
        rank = 0 if self.left is None else self.left.shape[1]
        tensors = (
            self.p, self.g, self.m, self.v, self.step, self.left, self.right, self.compensation
        )  # fmt: skip
        return [*(0 if t is None else t.data_ptr() for t in tensors), *self.shape, rank, self.index]

    def is_aligned(self) -> bool:
        """True if every address and size lets a thread load 16 bytes at a time."""
        *addresses, rows, cols, rank, _ = self.row()
        sizes = [cols, rows] if rank else [cols]
        return all(value % ALIGNMENT == 0 for value in (*addresses, *sizes))


def pointer_table(pieces: Sequence[Piece], device: torch.device) -> Tensor:
    """The rows of all pieces, (len, columns), int64."""
    return torch.tensor([piece.row() for piece in pieces], dtype=torch.int64).to(
        device, non_blocking=True
    )


def tile_table(
    shapes: Iterable[tuple[int, int]], block: tuple[int, int], device: torch.device
) -> Tensor:
    """Piece, row block and column block of every tile, (tiles, 3), int32, row blocks outermost."""
    parts = [torch.empty(0, 3, dtype=torch.int32)]
    for index, (rows, cols) in enumerate(shapes):
        down, across = -(-rows // block[0]), -(-cols // block[1])
        grid = torch.cartesian_prod(torch.arange(down), torch.arange(across)).view(-1, 2)
        parts.append(torch.nn.functional.pad(grid, (1, 0), value=index).to(torch.int32))
    return torch.cat(parts).to(device)
