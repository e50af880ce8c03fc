"""Randomized Nystrom: the top of a positive semi-definite operator from one pass of products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from safeopt.geometry.spectral.pairs import Eigenpairs, MatVec, products


def nystrom(
    matvec: MatVec,
    size: int,
    rank: int,
    *,
    oversampling: int = 8,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """Top eigenpairs of A from rank + oversampling products with random vectors.

    A is replaced by (A Q)(Q^T A Q)^+ (A Q)^T with Q the span of a Gaussian test matrix, made
    stable by a shift (Frangella, Tropp and Udell 2023, algorithm 2.1). The approximation never
    exceeds A; `nystrom_bound` bounds what it lacks in expectation.

    Args:
        matvec: v -> A v on flat vectors, A positive semi-definite (Gauss-Newton, Fisher).
        size: P.
        rank: k, pairs returned.
        oversampling: products beyond the rank.
        dtype: of the vectors.
        device: of the vectors.
        generator: draws the test matrix, on that device.

    Raises:
        ValueError: sizes that do not fit, or an operator that is not positive semi-definite.
    """
    samples = min(size, rank + oversampling)
    if not 1 <= rank <= size or oversampling < 0:
        raise ValueError(f"rank must lie between 1 and size, got {rank} and {size}")
    test = torch.randn(size, samples, generator=generator, dtype=dtype, device=device)
    test = torch.linalg.qr(test).Q
    image = products(matvec, test)
    shift = torch.finfo(dtype).eps * float(image.norm())
    image = image + shift * test
    core = test.T @ image
    factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2, upper=True)
    if int(failed):
        raise ValueError(
            "the operator is not positive semi-definite; use block_lanczos for a Hessian"
        )
    root = torch.linalg.solve_triangular(factor, image, upper=True, left=False)
    vectors, singular, _ = torch.linalg.svd(root, full_matrices=False)
    values = (singular.square() - shift).clamp(min=0)
    return Eigenpairs(values, vectors).top(rank)


def nystrom_bound(values: Tensor, samples: int) -> float:
    """Bound of E ||A - A_nys|| (Frangella, Tropp and Udell 2023, proposition 2.2).

    min over 2 <= p <= s - 2 of
    (1 + 2 (s - p) / (p - 1)) lambda_(s-p+1) + 2 e^2 s / (p^2 - 1) sum_(j > s-p) lambda_j

    Args:
        values: eigenvalues of A, largest first, (P,).
        samples: s, at least 4.
    """
    if samples < 4:
        raise ValueError(f"the bound needs at least 4 samples, got {samples}")
    tail = values.flip(0).cumsum(0).flip(0)
    bounds = [
        (1 + 2 * (samples - p) / (p - 1)) * float(values[samples - p])
        + 2 * math.e**2 * samples / (p**2 - 1) * float(tail[samples - p])
        for p in range(2, samples - 1)
        if samples - p < len(values)
    ]
    return min(bounds, default=0.0)
