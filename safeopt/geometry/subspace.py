"""The protocol of every representation of the safety subspace, and its per-matrix pieces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

EIGENVALUE_FLOOR = 1e-4  # directions below this share of the largest eigenvalue do not count


class Subspace(Protocol):
    """A subspace M of the whole parameter space, with its orthogonal projector P.

    `GradientSketch` and `DenseSubspace` hold directions of the whole space, `InputSubspace` and
    `KroneckerSubspace` a piece for every parameter alone.
    """

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def remove_(self, step: Mapping[str, Tensor]) -> None:
        """Write s <- s - P s in place.

        Args:
            step: tensors by parameter name, written in place. Where directions run through
                several parameters, all of them.
        """

    def spectrum(self) -> Tensor:
        """Energies of the directions, largest first, (k,)."""


def check_all_there(parameters: Mapping[str, Any], step: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` if a step lacks a parameter of the subspace."""
    missing = [name for name in parameters if name not in step]
    if missing:
        raise ValueError(
            f"the step lacks {missing[:3]}, which the subspace's directions run through; pass "
            "zeros for parameters that do not move"
        )


class Piece(Protocol):
    """The part of M that belongs to one parameter alone: its projector is a matrix product."""

    def removed(self, step: Tensor) -> Tensor:
        """Return P s in the bases' precision, of the shape of ``step``."""


@dataclass(frozen=True)
class InputPiece:
    """All changes of a matrix that act on given inputs: P s = s X X^T, or X X^T s.

    Attributes:
        basis: X, orthonormal, (n, r), fp32.
        dim: dimension of the parameter along which inputs run: 1 for `nn.Linear`, 0 for Conv1D.
    """

    basis: Tensor
    dim: int

    def removed(self, step: Tensor) -> Tensor:
        """Return P s."""
        s, basis = step.to(self.basis.dtype), self.basis
        return (s @ basis) @ basis.T if self.dim == 1 else basis @ (basis.T @ s)


@dataclass(frozen=True)
class RowsPiece:
    """All changes of some rows of an embedding table.

    Attributes:
        ids: the rows, int64, (k,).
    """

    ids: Tensor

    def removed(self, step: Tensor) -> Tensor:
        """Return P s: the rows themselves, zeros elsewhere."""
        result = torch.zeros_like(step)
        result[self.ids] = step[self.ids]
        return result


@dataclass(frozen=True)
class WholePiece:
    """Every change of a parameter: it is held where it is."""

    def removed(self, step: Tensor) -> Tensor:
        """Return s itself."""
        return step


@dataclass(frozen=True)
class GridPiece:
    """Masked coordinates on a grid: P s = B (mask o (B^T s X)) X^T for an (out, in) matrix.

    Attributes:
        outputs: B, orthonormal, (m, a), fp32.
        inputs: X, orthonormal, (n, r), fp32.
        mask: coordinates that belong to M, (a, r), bool.
        dim: dimension of the parameter along which inputs run, as in `InputPiece`.
    """

    outputs: Tensor
    inputs: Tensor
    mask: Tensor
    dim: int

    def removed(self, step: Tensor) -> Tensor:
        """Return P s."""
        step = step.to(self.inputs.dtype)
        s = step if self.dim == 1 else step.T
        grid = (self.outputs.T @ s @ self.inputs) * self.mask
        removed = self.outputs @ grid @ self.inputs.T
        return removed if self.dim == 1 else removed.T


Pieces = Mapping[str, tuple[Piece, ...]]


def removed_by(pieces: tuple[Piece, ...], step: Tensor) -> Tensor:
    """Return P s for one parameter whose pieces commute."""
    total = pieces[0].removed(step)
    for piece in pieces[1:]:
        total = total + piece.removed(step - total)
    return total


def remove_pieces_(pieces: Pieces, step: Mapping[str, Tensor]) -> None:
    """Write s <- s - P s in place, each parameter by its own pieces."""
    for name, tensor in step.items():
        if name in pieces:
            tensor -= removed_by(pieces[name], tensor)
