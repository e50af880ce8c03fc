"""Per-anchor gradients of one parameter, in the form that costs least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_GRAM_ROWS = 256  # rows of factors whose products are made at a time


class Block(Protocol):
    """The gradients G_i of N anchors with respect to one parameter (or one use of it)."""

    def __len__(self) -> int:
        """Return N."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def gram(self) -> Tensor:
        """Return <G_i, G_j>, (N, N)."""

    def coefficients(self, step: Tensor) -> Tensor:
        """Return <G_i, step>, (N,)."""

    def subtract_(self, step: Tensor, weights: Tensor) -> None:
        """Write step -= sum_i weights_i G_i."""

    def bound(self) -> Tensor:
        """Return an upper bound on the norm of all N gradients together; 0 only if they are 0."""

    def dense(self, shape: torch.Size) -> Tensor:
        """Return the gradients themselves, (N, *shape)."""

    def times(self, vectors: Tensor) -> Block:
        """Return the block of G_i V, with G_i as matrices of n columns and V (n, k)."""


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class LowRankBlock:
    """Gradients of an m x n matrix as factors, G_i = left_i^T right_i.

    Attributes:
        left: (N, r, m), fp32.
        right: (N, r, n), fp32.
    """

    left: Tensor
    right: Tensor

    def __len__(self) -> int:
        return len(self.left)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return _nbytes(self.left, self.right)

    def gram(self) -> Tensor:
        """Return <G_i, G_j> = sum over r, s of (L_i L_j^T o R_i R_j^T), (N, N)."""
        n, r, _ = self.left.shape
        left, right = self.left.flatten(0, 1), self.right.flatten(0, 1)
        gram = left.new_empty(n, n)
        # Row blocks up to the diagonal: half of the products, and none of (N r) x (N r) is held.
        anchors = max(1, _GRAM_ROWS // max(r, 1))
        for start in range(0, n, anchors):
            end = min(start + anchors, n)
            rows = slice(start * r, end * r)
            products = (left[rows] @ left[: end * r].T) * (right[rows] @ right[: end * r].T)
            part = products.view(end - start, r, end, r).sum((1, 3))
            gram[start:end, :end] = part
            gram[:end, start:end] = part.T
        return gram

    def coefficients(self, step: Tensor) -> Tensor:
        """Return <G_i, step>, (N,), as one matrix product with the m x n step."""
        image = self.left.flatten(0, 1) @ step.float()
        return (image.view_as(self.right) * self.right).sum((1, 2))

    def subtract_(self, step: Tensor, weights: Tensor) -> None:
        """Write step -= sum_i weights_i left_i^T right_i."""
        left = (self.left * weights.to(self.left)[:, None, None]).flatten(0, 1)
        right = self.right.flatten(0, 1)
        if step.dtype == torch.float32:
            step.addmm_(left.T, right, alpha=-1)
        else:
            step.copy_(step.float() - left.T @ right)

    def bound(self) -> Tensor:
        """Return an upper bound on the norm of all N gradients together; 0 only if they are 0."""
        bound: Tensor = self.left.norm() * self.right.norm()
        return bound

    def dense(self, shape: torch.Size) -> Tensor:
        """Return the gradients themselves, (N, m, n)."""
        return (self.left.mT @ self.right).view(-1, *shape)

    def times(self, vectors: Tensor) -> LowRankBlock:
        """Return the block of G_i V = left_i^T (right_i V)."""
        return LowRankBlock(self.left, self.right @ vectors)


@dataclass(frozen=True)
class RowsBlock:
    """Gradients of an embedding table: only the rows of the tokens that occur.

    Attributes:
        ids: token ids, (N, T).
        rows: gradient at the embedding's output, (N, T, d), fp32.
    """

    ids: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return _nbytes(self.ids, self.rows)

    def gram(self) -> Tensor:
        """Return <G_i, G_j>, (N, N): products of rows whose token is the same."""
        n, t = self.ids.shape
        ids, rows = self.ids.flatten(), self.rows.flatten(0, 1)
        products = (rows @ rows.T) * (ids[:, None] == ids)
        return products.view(n, t, n, t).sum((1, 3))

    def coefficients(self, step: Tensor) -> Tensor:
        """Return <G_i, step>, (N,)."""
        return (step[self.ids].float() * self.rows).sum((1, 2))

    def subtract_(self, step: Tensor, weights: Tensor) -> None:
        """Write step -= sum_i weights_i G_i on the rows that occur."""
        ids, position = torch.unique(self.ids, return_inverse=True)
        rows = self.rows * weights.to(self.rows)[:, None, None]
        change = rows.new_zeros(len(ids), rows.shape[-1])
        change.index_add_(0, position.flatten(), rows.flatten(0, 1))
        step[ids] = (step[ids].float() - change).to(step.dtype)

    def bound(self) -> Tensor:
        """Return an upper bound on the norm of all N gradients together; 0 only if they are 0."""
        bound: Tensor = self.rows.norm()
        return bound

    def dense(self, shape: torch.Size) -> Tensor:
        """Return the gradients themselves, (N, vocabulary, d)."""
        result = self.rows.new_zeros(len(self.ids), *shape)
        for anchor, ids, rows in zip(result, self.ids, self.rows, strict=True):
            anchor.index_add_(0, ids, rows)
        return result

    def times(self, vectors: Tensor) -> RowsBlock:
        """Return the block of G_i V, whose rows are those of the same tokens."""
        return RowsBlock(self.ids, self.rows @ vectors)


@dataclass(frozen=True)
class DenseBlock:
    """Gradients of a small parameter (norm, bias) as they are.

    Attributes:
        rows: (N, numel), fp32.
    """

    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return _nbytes(self.rows)

    def gram(self) -> Tensor:
        """Return <G_i, G_j>, (N, N)."""
        return self.rows @ self.rows.T

    def coefficients(self, step: Tensor) -> Tensor:
        """Return <G_i, step>, (N,)."""
        return self.rows @ step.flatten().float()

    def subtract_(self, step: Tensor, weights: Tensor) -> None:
        """Write step -= sum_i weights_i G_i."""
        change = weights.to(self.rows) @ self.rows
        step.copy_((step.float() - change.view_as(step)).to(step.dtype))

    def bound(self) -> Tensor:
        """Return an upper bound on the norm of all N gradients together; 0 only if they are 0."""
        bound: Tensor = self.rows.norm()
        return bound

    def dense(self, shape: torch.Size) -> Tensor:
        """Return the gradients themselves, (N, *shape)."""
        return self.rows.view(-1, *shape)

    def times(self, vectors: Tensor) -> DenseBlock:
        """Return the block of G_i V."""
        return DenseBlock((self.rows.unflatten(1, (-1, len(vectors))) @ vectors).flatten(1))


def squared_norm(tensor: Tensor) -> float:
    """||t||^2, summed in fp32 or better."""
    precision = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=precision)) ** 2


def cross_gram(first: Block, second: Block) -> Tensor:
    """Return <A_i, B_j>, (N, N), for two blocks of one parameter (a tied embedding).

    Raises:
        TypeError: a pair of block types that no known architecture produces.
    """
    if isinstance(first, LowRankBlock) and isinstance(second, RowsBlock):
        return cross_gram(second, first).T
    if isinstance(first, RowsBlock) and isinstance(second, LowRankBlock):
        return _rows_times_low_rank(first, second)
    raise TypeError(f"no inner product between {type(first).__name__} and {type(second).__name__}")


def _rows_times_low_rank(first: RowsBlock, second: LowRankBlock) -> Tensor:
    n, t, d = first.rows.shape
    count, r, _ = second.left.shape
    left = second.left.flatten(0, 1)[:, first.ids.flatten()]
    right = second.right.flatten(0, 1) @ first.rows.view(n * t, d).T
    return (left * right).view(count, r, n, t).sum((1, 3)).T


_KINDS: dict[frozenset[str], type[LowRankBlock] | type[RowsBlock] | type[DenseBlock]] = {
    frozenset(kind.__dataclass_fields__): kind for kind in (LowRankBlock, RowsBlock, DenseBlock)
}


def to_state(block: Block) -> dict[str, Tensor]:
    """The tensors of a block by field name."""
    return dict(vars(block))


def from_state(state: Mapping[str, Tensor]) -> Block:
    """Rebuild the block whose fields these are."""
    return _KINDS[frozenset(state)](**state)
