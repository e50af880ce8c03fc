"""The primitives in plain torch: the truth that every kernel is held to.

They compute in the dtype of the moments m and v, so that float64 tensors give a float64 truth.
Shapes: p, g, m, v and the step are (rows, cols); factors are left (N, q, rows) and
right (N, q, cols), which stand for N matrices G_i = left_i^T right_i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safeopt_kernels.settings import AdamW, Seed

_WORD = 0xFFFFFFFF


def propose_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, adamw: AdamW) -> Tensor:
    """Update m and v in place; return the step s, weight decay included, in their dtype."""
    p, g = p.to(m.dtype), g.to(m.dtype)
    m.mul_(adamw.beta1).add_(g, alpha=1 - adamw.beta1)
    v.mul_(adamw.beta2).addcmul_(g, g, value=1 - adamw.beta2)
    denominator = v.sqrt() / adamw.root_correction + adamw.eps
    return -adamw.decay * p - adamw.step_size * m / denominator


def coefficients(step: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return c_i = <G_i, s> = sum over q of left_i s right_i^T, (N,)."""
    image = left.to(step) @ step
    return (image * right.to(step)).sum((1, 2))


def low_rank(left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """Return sum_i a_i G_i, (rows, cols), in the dtype of the weights a."""
    scaled = (left.to(weights) * weights[:, None, None]).flatten(0, 1)
    return scaled.T @ right.to(weights).flatten(0, 1)


def project_rows(step: Tensor, basis: Tensor) -> Tensor:
    """Return s (I - X X^T) for orthonormal columns X, (cols, r): no row of it moves along X."""
    basis = basis.to(step)
    return step - (step @ basis) @ basis.T


def store(p: Tensor, change: Tensor) -> None:
    """Write p <- p + change, rounded to nearest."""
    p.copy_(p.to(change) + change)


def store_stochastic(p: Tensor, change: Tensor, seed: Seed, index: int = 0) -> None:
    """Write p <- p + change to bfloat16, up or down by chance so that the mean is exact.

    Args:
        p: (rows, cols), bfloat16.
        change: float32.
        seed: of the random bits.
        index: which tensor of a list this is.
    """
    p.copy_(stochastic_bfloat16(p.to(change) + change, seed, index))


def stochastic_bfloat16(exact: Tensor, seed: Seed, index: int = 0) -> Tensor:
    """Round a float32 matrix to bfloat16 by adding 16 random bits below the cut."""
    noise = random_bits(exact.shape[0], exact.shape[1], seed, index).to(exact.device)
    bits = exact.float().view(torch.int32)
    rounded = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(exact.isfinite(), rounded, exact.float()).to(torch.bfloat16)


def store_kahan(p: Tensor, change: Tensor, compensation: Tensor) -> None:
    """Write p <- p + change and keep what rounding dropped for the next step.

    Args:
        p: any floating dtype.
        change: at least as wide as p.
        compensation: dtype of p; what is still owed to p.
    """
    owed = change + compensation.to(change)
    exact = p.to(change.dtype, copy=True)
    p.copy_(exact + owed)
    compensation.copy_(owed - (p.to(change) - exact))


def random_bits(rows: int, cols: int, seed: Seed, index: int) -> Tensor:
    """Return 16 random bits per element, (rows, cols) int32.

    Element (i, j) takes the low half of word j mod 4 of Philox-4x32-10 at the counter
    (i ceil(cols/4) + floor(j/4) in 64 bits, index, step).
    """
    quads = -(-cols // 4)
    offset = torch.arange(rows * quads, dtype=torch.int64)
    counter = (offset & _WORD, offset >> 32, torch.full_like(offset, index & _WORD))
    words = philox(seed.seed, (*counter, torch.full_like(offset, seed.step & _WORD)))
    table = torch.stack(words, dim=-1).view(rows, 4 * quads)[:, :cols]
    return (table & 0xFFFF).to(torch.int32)


def philox(seed: int, counter: tuple[Tensor, ...], rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox-4x32 (Salmon et al. 2011): four 32-bit words, in int64, per 128-bit counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64, which keeps the bits
        c0, c1, c2, c3 = (
            ((b >> 32) & _WORD) ^ c1 ^ k0,
            b & _WORD,
            ((a >> 32) & _WORD) ^ c3 ^ k1,
            a & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3
