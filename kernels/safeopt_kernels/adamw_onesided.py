r"""K2: an AdamW step that leaves a subspace of every row alone, in one launch per matrix.

    m, v, s <- AdamW(p, g, m, v);   p <- p + s (I - X X^T),   X (cols, r) with orthonormal columns

A program takes a block of whole rows. It walks over the columns once, updates m and v, puts the
step aside and adds up y = s X; then it walks over them again and writes p + s - y X^T. The step
waits in ``stash``, a buffer with room for one row block per program, which is used again and
again: it stays in the L2 cache, as do the weights that were read a moment before. y waits beside
it in ``images``: whole, it would take too many registers as an operand. With bf16 weights and
gradients and fp32 moments that is 12 bytes read and 12 written per parameter, 24, when what a
program reads again is not counted.

The columns of X beyond ``rank`` are read as zeros. Nothing crosses a row, so that shards of rows
need no communication.
"""

# Triton functions have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from safeopt_kernels.rounding import KAHAN, STOCHASTIC, random_bits, stochastic


@triton.jit
def _basis_tile(basis, col, cols, k, rank):
    at = col[:, None].to(tl.int64) * rank + k[None, :]
    return tl.load(basis + at, mask=(col[:, None] < cols) & (k[None, :] < rank), other=0.0)


@triton.jit(do_not_specialize=["rows", "seed", "step_number", "index"])
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
    seed,
    step_number,
    index,
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
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """All row blocks of one program; ``norms`` takes ||s||^2 and ||y||^2 of each row block."""
    local = tl.arange(0, BM)
    whole, chunk = tl.arange(0, R), tl.arange(0, BK)
    aside = stash + (tl.program_id(0).to(tl.int64) * BM + local[:, None]) * cols
    kept = images + (tl.program_id(0).to(tl.int64) * BM + local[:, None]) * R
    for block in range(tl.program_id(0), tl.cdiv(rows, BM), tl.num_programs(0)):
        row = block * BM + local
        base = row[:, None].to(tl.int64) * cols
        image = tl.zeros((BM, R), tl.float32)
        squares = tl.zeros((BM, BN), tl.float32)
        for start in range(0, cols, BN):
            col = start + tl.arange(0, BN)
            mask = (row[:, None] < rows) & (col[None, :] < cols)
            at = base + col[None, :]
            old = tl.load(p + at, mask=mask, other=0.0).to(tl.float32)
            slope = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
            first = beta1 * tl.load(m + at, mask=mask, other=0.0).to(tl.float32) + rest1 * slope
            second = tl.load(v + at, mask=mask, other=0.0).to(tl.float32)
            second = beta2 * second + rest2 * slope * slope
            tl.store(m + at, first.to(m.dtype.element_ty), mask=mask)
            tl.store(v + at, second.to(v.dtype.element_ty), mask=mask)
            exact = -decay * old - step_size * first / (tl.sqrt(second) / root_correction + eps)
            rounded = exact.to(p.dtype.element_ty)
            tl.store(aside + col[None, :], rounded, mask=mask)
            step = tl.where(mask, rounded.to(tl.float32), 0.0)
            squares += step * step
            tile = _basis_tile(basis, col, cols, whole, rank)
            image = tl.dot(step.to(DOT), tile.to(DOT), image, input_precision=PRECISION)
        tl.store(norms + 2 * block, tl.sum(squares))
        tl.store(norms + 2 * block + 1, tl.sum(image * image))
        tl.store(kept + whole[None, :], image)
        tl.debug_barrier()  # other threads of the program read what was put aside
        for start in range(0, cols, BN):
            col = start + tl.arange(0, BN)
            mask = (row[:, None] < rows) & (col[None, :] < cols)
            at = base + col[None, :]
            removed = tl.zeros((BM, BN), tl.float32)
            for first_k in range(0, R, BK):
                k = first_k + chunk
                tile = tl.trans(_basis_tile(basis, col, cols, k, rank).to(tl.float32))
                part = tl.load(kept + k[None, :])
                removed = tl.dot(part, tile, removed, input_precision=PRECISION)
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
