"""Rank-q compression of per-anchor gradients that are held as token factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.geometry.moves import check_finite_products

# One batch of token Gram matrices stays below this many elements (256 MB in fp32).
_BATCH_ELEMENTS = 1 << 26
_POWER_ITERATIONS = 1
_OVERSAMPLING = 4


@dataclass(frozen=True)
class Factors:
    """Per-anchor gradients of one m x n matrix as factors: G_i = left_i^T right_i.

    Attributes:
        left: (N, r, m), fp32.
        right: (N, r, n), fp32.
        energy: ||G_i||_F^2 before compression, (N,); None where it was not measured.
    """

    left: Tensor
    right: Tensor
    energy: Tensor | None = None


def compress(factors: Sequence[Factors], rank: int, seed: int = 0) -> list[Factors]:
    """Keep about the top ``rank`` singular directions of every anchor's gradient matrix.

    With token factors D (T x m) and X (T x n), G = D^T X. All the work happens between the
    T x T Gram matrices D D^T and X X^T: a block power iteration W <- (D D^T)(X X^T) W finds the
    coordinates of the leading right singular subspace P = X^T W, and

        G P P^T = (W'^T X X^T D)^T (W'^T X),   W' = W (W^T X X^T W)^(-1/2)

    is again a pair of factors, with ``rank`` rows (Halko, Martinsson, Tropp 2011, algorithm 4.4,
    carried out in token space). The discarded energy is known exactly:
    ||G||_F^2 = sum (D D^T) o (X X^T).

    Args:
        factors: token factors of any number of matrices.
        rank: directions kept per anchor and matrix; matrices with no more tokens than that
            are returned unchanged.
        seed: seed of the starting block.

    Returns:
        Factors of the same matrices, in order, each with its exact ``energy``.

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    result: list[Factors | None] = [None] * len(factors)
    for chunk in _chunks(factors):
        for index, compressed in zip(
            chunk, _compress_chunk([factors[i] for i in chunk], rank, seed), strict=True
        ):
            result[index] = compressed
    return [f for f in result if f is not None]


def _chunks(factors: Sequence[Factors]) -> list[list[int]]:
    """Group matrices with equal (N, T) so that each group is one batch of small problems."""
    chunks: dict[tuple[int, ...], list[list[int]]] = {}
    for index, f in enumerate(factors):
        shape = tuple(f.left.shape[:2])
        limit = max(1, _BATCH_ELEMENTS // max(1, shape[0] * shape[1] ** 2))
        groups = chunks.setdefault(shape, [[]])
        if len(groups[-1]) >= limit:
            groups.append([])
        groups[-1].append(index)
    return [group for groups in chunks.values() for group in groups]


def _compress_chunk(factors: list[Factors], rank: int, seed: int) -> list[Factors]:
    left_gram, right_gram = _token_grams(factors)
    energy = (left_gram * right_gram).sum((-1, -2)).clamp(min=0)
    if factors[0].left.shape[1] <= rank:
        pairs = zip(factors, energy, strict=True)
        return [Factors(f.left, f.right, e) for f, e in pairs]
    # Attention sinks make some inputs a thousand times longer than others: give every input unit
    # length and its length to the output gradient, which leaves G alone and fp32 accurate.
    length = right_gram.diagonal(dim1=-2, dim2=-1).sqrt()[..., None]
    length = length.masked_fill(length == 0, 1.0)
    left_gram, right_gram = left_gram * (length * length.mT), right_gram / (length * length.mT)
    try:
        unit = _leading_coordinates(left_gram.double(), right_gram.double(), rank, seed)
    except torch.linalg.LinAlgError:  # asked afterwards: to look makes the host wait for the device
        check_finite_products(energy)
        raise
    to_right, to_left = (unit / length).float(), (right_gram.double() @ unit * length).float()
    return [
        Factors(cl.mT @ f.left, cr.mT @ f.right, e)
        for f, cl, cr, e in zip(factors, to_left, to_right, energy, strict=True)
    ]


def _token_grams(factors: list[Factors]) -> tuple[Tensor, Tensor]:
    """D D^T and X X^T of every matrix, each (matrices, N, T, T)."""
    known: dict[tuple[int, torch.Size], Tensor] = {}  # q, k and v read one and the same input

    def gram(tokens: Tensor) -> Tensor:
        key = (tokens.data_ptr(), tokens.shape)
        if key not in known:
            known[key] = tokens @ tokens.mT
        return known[key]

    left = torch.stack([gram(f.left) for f in factors])
    return left, torch.stack([gram(f.right) for f in factors])


def _leading_coordinates(left_gram: Tensor, right_gram: Tensor, rank: int, seed: int) -> Tensor:
    """Token coordinates W (..., T, rank) with X^T W orthonormal and spanning the leading space."""
    generator = torch.Generator().manual_seed(seed)
    tokens = left_gram.shape[-1]
    start = torch.randn(tokens, min(tokens, rank + _OVERSAMPLING), generator=generator)
    block = start.to(left_gram)
    for _ in range(_POWER_ITERATIONS):
        block, _ = torch.linalg.qr(left_gram @ (right_gram @ block))
    block = _whiten(block, block.mT @ right_gram @ block)
    image = right_gram @ block  # in token coordinates, G P = D^T image
    _, vectors = torch.linalg.eigh(image.mT @ left_gram @ image)
    leading: Tensor = block @ vectors.flip(-1)[..., :rank]
    return leading


def _whiten(block: Tensor, gram: Tensor) -> Tensor:
    """Return block gram^(-1/2), dropping (as zeros) directions that are numerically absent."""
    values, vectors = torch.linalg.eigh(gram)
    floor = values[..., -1:].clamp(min=torch.finfo(values.dtype).tiny) * 1e-7
    scale = torch.where(values > floor, values.clamp(min=0).rsqrt(), torch.zeros_like(values))
    whitening: Tensor = vectors * scale[..., None, :]
    return block @ whitening
