"""Device functions that store a sum: rounded to nearest, stochastically, or with compensation."""

# Triton functions have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from safeopt_kernels.settings import ROUNDINGS

NEAREST = tl.constexpr(ROUNDINGS.index("nearest"))
STOCHASTIC = tl.constexpr(ROUNDINGS.index("stochastic"))
KAHAN = tl.constexpr(ROUNDINGS.index("kahan"))


@triton.jit
def random_bits(row, col_block, quads, index, seed, step, BN: tl.constexpr):
    """16 random bits per element of a tile; see `reference.random_bits` for the counter."""
    quad = col_block * (BN // 4) + tl.arange(0, BN // 4)
    offset = row[:, None].to(tl.int64) * quads + quad[None, :]
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    high = (offset >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, index.to(tl.uint32), step.to(tl.uint32))
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (words & 0xFFFF).to(tl.int32)


@triton.jit
def stochastic(exact, bits):
    """float32 to bfloat16, up or down by chance: random bits below the cut, then a plain cut."""
    cut = ((exact.to(tl.int32, bitcast=True) + bits) & -65536).to(tl.float32, bitcast=True)
    finite = tl.abs(exact) < float("inf")
    return tl.where(finite, cut, exact).to(tl.bfloat16)
