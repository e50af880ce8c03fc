r"""K2: an AdamW step that leaves a subspace of every row alone, in one launch per matrix.

    m, v, s <- AdamW(p, g, m, v);   p <- p + s (I - X X^T),   X (cols, r) with orthonormal columns

A program takes a block of whole rows and walks over their columns: once to update m and v and to
put the step aside, once for every BK columns of X to add up their part of y = s X, and once to
write p + s - y X^T. The step waits in ``stash`` and y in ``images``, buffers with room for one row
block per program, which are used again and again. What a program will read again (weights and
step) is marked to stay in the L2 cache, what it will not (gradient and moments) to leave first.
With bf16 weights and gradients and fp32 moments that is 12 bytes read and 12 written per
parameter, 24, when what a program reads again is not counted.

The rank is a runtime value, a multiple of 16, and costs no registers. Nothing crosses a row, so
that shards of rows need no communication.
"""

# Triton functions have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from safeopt_kernels.rounding import KAHAN, STOCHASTIC, random_bits, stochastic


@triton.jit
def _basis_tile(basis, col, k, cols, rank):
    """Rows ``col`` and columns ``k`` of X; zero outside."""
    at = col[:, None].to(tl.int64) * rank + k[None, :]
    return tl.load(basis + at, mask=(col[:, None] < cols) & (k[None, :] < rank), other=0.0)


VALUES = ("rows", "seed", "step_number", "index")  # arguments whose value makes no new binary


@triton.jit(do_not_specialize=VALUES)
def onesided(
    p,
    g,
    m,
    v,
    basis,
    stash,
    images,
    compensation,
    norms,
    rows,
    cols,
    rank,
    seed: tl.int64,
    step_number: tl.int64,
    index: tl.int64,
    decay,
    step_size,
    beta1,
    rest1,
    beta2,
    rest2,
    root_correction,
    eps,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDING: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """All row blocks of one program; ``norms`` takes ||s||^2 and ||y||^2 of each row block."""
    local = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    aside = stash + local * cols
    image_row = images + local * rank
    for block in range(tl.program_id(0), tl.cdiv(rows, BM), tl.num_programs(0)):
        row = block * BM + tl.arange(0, BM)
        base = row[:, None].to(tl.int64) * cols
        squares = tl.zeros((BM, BN), tl.float32)
        for start in range(0, cols, BN):
            col = start + tl.arange(0, BN)
            mask = (row[:, None] < rows) & (col[None, :] < cols)
            at = base + col[None, :]
            old = tl.load(p + at, mask=mask, other=0.0, eviction_policy="evict_last")
            slope = tl.load(g + at, mask=mask, other=0.0, eviction_policy="evict_first")
            first = tl.load(m + at, mask=mask, other=0.0, eviction_policy="evict_first")
            second = tl.load(v + at, mask=mask, other=0.0, eviction_policy="evict_first")
            slope = slope.to(tl.float32)
            first = beta1 * first.to(tl.float32) + rest1 * slope
            second = beta2 * second.to(tl.float32) + rest2 * slope * slope
            out = first.to(m.dtype.element_ty)
            tl.store(m + at, out, mask=mask, eviction_policy="evict_first")
            out = second.to(v.dtype.element_ty)
            tl.store(v + at, out, mask=mask, eviction_policy="evict_first")
            exact = -decay * old.to(tl.float32)
            exact -= step_size * first / (tl.sqrt(second) / root_correction + eps)
            rounded = exact.to(p.dtype.element_ty)
            tl.store(aside + col[None, :], rounded, mask=mask, eviction_policy="evict_last")
            step = tl.where(mask, rounded.to(tl.float32), 0.0)
            squares += step * step
        tl.store(norms + 2 * block, tl.sum(squares))
        tl.debug_barrier()  # other threads of the program read what was put aside
        along = 0.0
        for k_start in range(0, rank, BK):
            k = k_start + tl.arange(0, BK)
            image = tl.zeros((BM, BK), tl.float32)
            for start in range(0, cols, BN):
                col = start + tl.arange(0, BN)
                mask = (row[:, None] < rows) & (col[None, :] < cols)
                step = tl.load(aside + col[None, :], mask=mask, other=0.0).to(DOT)
                tile = _basis_tile(basis, col, k, cols, rank).to(DOT)
                image = tl.dot(step, tile, image, input_precision=PRECISION)
            tl.store(image_row + k[None, :], image, mask=k[None, :] < rank)
            along += tl.sum(image * image)
        tl.store(norms + 2 * block + 1, along)
        tl.debug_barrier()
        for start in range(0, cols, BN):
            col = start + tl.arange(0, BN)
            mask = (row[:, None] < rows) & (col[None, :] < cols)
            at = base + col[None, :]
            removed = tl.zeros((BM, BN), tl.float32)
            for k_start in range(0, rank, BK):
                k = k_start + tl.arange(0, BK)
                image = tl.load(image_row + k[None, :], mask=k[None, :] < rank, other=0.0)
                tile = tl.trans(_basis_tile(basis, col, k, cols, rank).to(tl.float32))
                removed = tl.dot(image, tile, removed, input_precision=PRECISION)
            step = tl.load(aside + col[None, :], mask=mask, other=0.0).to(tl.float32)
            change = step - removed
            old = tl.load(p + at, mask=mask, other=0.0).to(tl.float32)
            if ROUNDING == STOCHASTIC:
                quads, number = (cols + 3) // 4, tl.to_tensor(index)
                bits = random_bits(row, start // BN, quads, number, seed, step_number, BN)
                tl.store(p + at, stochastic(old + change, bits), mask=mask)
            elif ROUNDING == KAHAN:
                owed = change + tl.load(compensation + at, mask=mask, other=0.0).to(tl.float32)
                new = (old + owed).to(p.dtype.element_ty)
                rest = owed - (new.to(tl.float32) - old)
                tl.store(p + at, new, mask=mask)
                tl.store(compensation + at, rest.to(p.dtype.element_ty), mask=mask)
            else:
                tl.store(p + at, (old + change).to(p.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # the next row block puts its step in the same place


# The same for any number of columns and any addresses, which would each make a binary of its own.
onesided_any = triton.jit(
    onesided.fn,
    do_not_specialize=(*VALUES, "cols"),
    do_not_specialize_on_alignment=("p", "g", "m", "v", "basis", "compensation"),
)
