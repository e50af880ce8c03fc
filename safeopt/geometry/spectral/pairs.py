"""Eigenpairs and what a product says about their quality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MatVec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs of a symmetric operator.

    Attributes:
        values: largest first, (k,).
        vectors: orthonormal columns, (P, k).
    """

    values: Tensor
    vectors: Tensor

    def top(self, rank: int) -> Eigenpairs:
        """The first ``rank`` pairs."""
        return Eigenpairs(self.values[:rank], self.vectors[:, :rank])


def products(matvec: MatVec, columns: Tensor) -> Tensor:
    """A Q, one product per column, (P, k)."""
    return torch.stack([matvec(column) for column in columns.T], dim=1)


def residuals(matvec: MatVec, pairs: Eigenpairs) -> Tensor:
    """||A u - lambda u|| of each pair, (k,), from k products.

    For symmetric A an eigenvalue lies within that distance of each value (Weinstein), and the
    angle to its eigenvector has a sine of at most residual / gap (Davis and Kahan 1970).
    """
    applied = products(matvec, pairs.vectors)
    distances: Tensor = torch.linalg.vector_norm(applied - pairs.vectors * pairs.values, dim=0)
    return distances
