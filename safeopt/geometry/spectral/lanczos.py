"""Block Lanczos: a few extreme eigenpairs of a symmetric operator, sharp gaps or not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from safeopt.geometry.spectral.pairs import Eigenpairs, MatVec, products


def block_lanczos(
    matvec: MatVec,
    size: int,
    rank: int,
    *,
    block: int | None = None,
    iterations: int = 10,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The largest eigenpairs of A from block * iterations products.

    Rayleigh-Ritz on the block Krylov space of a random start, with full reorthogonalisation, so
    that the basis stays orthonormal and no pair appears twice. `residuals` says how good a pair
    is; a block as wide as a cluster of eigenvalues finds all of the cluster.

    Args:
        matvec: v -> A v on flat vectors, A symmetric; it may be indefinite.
        size: P.
        rank: k, pairs returned.
        block: vectors advanced together; the rank by default.
        iterations: blocks in the basis; memory is 2 * block * iterations vectors.
        dtype: of the vectors.
        device: of the vectors.
        generator: draws the start, on that device.

    Raises:
        ValueError: a basis smaller than the rank.
    """
    block = min(size, rank if block is None else block)
    if not 1 <= rank <= min(size, block * iterations):
        raise ValueError(
            f"{iterations} iterations of {block} vectors cannot give {rank} pairs of {size}"
        )
    start = torch.randn(size, block, generator=generator, dtype=dtype, device=device)
    blocks, images = zip(*_krylov(matvec, start, iterations), strict=True)
    basis, image = torch.cat(blocks, dim=1), torch.cat(images, dim=1)
    projected = basis.T @ image
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    return Eigenpairs(values.flip(0), basis @ vectors.flip(1)).top(rank)


def _krylov(matvec: MatVec, start: Tensor, iterations: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Orthonormal blocks Q_j of the Krylov space with A Q_j, until it is exhausted."""
    basis, following = start.new_zeros(len(start), 0), start
    for _ in range(iterations):
        q = _orthonormal_beyond(basis, following)
        if not q.shape[1]:
            return
        image = products(matvec, q)
        yield q, image
        basis, following = torch.cat([basis, q], dim=1), image


def _orthonormal_beyond(basis: Tensor, columns: Tensor) -> Tensor:
    """Orthonormal basis of what ``columns`` add to the span of ``basis``, (P, <= b)."""
    scale = columns.norm(dim=0).max().clamp(min=torch.finfo(columns.dtype).tiny)
    left = columns / scale
    for _ in range(2):  # twice is enough (Kahan)
        left = left - basis @ (basis.T @ left)
    q, singular, _ = torch.linalg.svd(left, full_matrices=False)
    q = q[:, singular > 100 * torch.finfo(columns.dtype).eps]
    q = q - basis @ (basis.T @ q)
    orthonormal: Tensor = torch.linalg.qr(q).Q if q.shape[1] else q
    return orthonormal
