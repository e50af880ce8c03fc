r"""K1: an AdamW step whose low-rank part can be taken out, in two passes over a list of matrices.

    pass 1, `propose`:  m, v, s <- AdamW(p, g, m, v);   c_i = <G_i, s>,   ||s||^2
    pass 2, `apply`:    p <- p + s - sum_i a_i G_i,     G_i = left_i^T right_i

The caller works out a from c in between. Pass 1 hands the step over in the dtype of the weights,
and c is that of the rounded step, so that what is measured is what is handed over. With bf16
weights and gradients and fp32 moments a parameter costs 12 bytes read and 10 written in pass 1,
4 read and 2 written in pass 2: 28. Factors are read once per tile and stay in the L2 cache.

IN_PLACE hands it over in the weights instead: pass 1 writes p + s, s is what was really stored,
pass 2 subtracts. That costs 26 bytes and no buffer, and rounds the weights twice; stochastic and
compensated rounding want the one rounding of the step buffer.

One launch does every matrix of a list. A program does one tile of one matrix: ``tiles`` says
which, ``pieces`` holds the matrix's pointers and sizes (`safeopt_kernels.table`). The tile products
run on tensor cores and add up in fp32. A tile writes its own row of partial sums and the rows are
added in a fixed order afterwards: no atomics, the same bits in every run.
"""

# Triton functions have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from safeopt_kernels.rounding import KAHAN, STOCHASTIC, random_bits, stochastic
from safeopt_kernels.table import COLUMNS

# Columns of a row of `pieces`.
STRIDE = tl.constexpr(len(COLUMNS))
P = tl.constexpr(COLUMNS.index("p"))
G = tl.constexpr(COLUMNS.index("g"))
M = tl.constexpr(COLUMNS.index("m"))
V = tl.constexpr(COLUMNS.index("v"))
STEP = tl.constexpr(COLUMNS.index("step"))
LEFT = tl.constexpr(COLUMNS.index("left"))
RIGHT = tl.constexpr(COLUMNS.index("right"))
COMPENSATION = tl.constexpr(COLUMNS.index("compensation"))
ROWS = tl.constexpr(COLUMNS.index("rows"))
COLS = tl.constexpr(COLUMNS.index("cols"))
RANK = tl.constexpr(COLUMNS.index("rank"))
INDEX = tl.constexpr(COLUMNS.index("index"))


@triton.jit
def _pointer(piece, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer out of the table; the hint is what lets loads through it be 16 bytes wide."""
    pointer = tl.load(piece + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _size(piece, column: tl.constexpr, ALIGNED: tl.constexpr):
    """A size out of the table. The rows of an aligned matrix without factors may be any number."""
    size = tl.load(piece + column).to(tl.int32)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return size


@triton.jit
def _factor(pointer, k, ranks, at, size):
    """Rows k of a factor, at the given columns; zero outside."""
    offset = k[:, None].to(tl.int64) * size + at[None, :]
    mask = (k[:, None] < ranks) & (at[None, :] < size)
    return tl.load(pointer + offset, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["count"])
def propose(
    pieces,
    tiles,
    partials,
    norms,
    count,
    decay,
    step_size,
    beta1,
    rest1,
    beta2,
    rest2,
    root_correction,
    eps,
    WEIGHT: tl.constexpr,
    MOMENT: tl.constexpr,
    FACTOR: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ALIGNED: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Pass 1 of one tile. ``rest`` is 1 - beta; the parts are looked at N by N."""
    tile = tl.program_id(0).to(tl.int64)
    piece = pieces + tl.load(tiles + 3 * tile).to(tl.int64) * STRIDE
    rows, cols = _size(piece, ROWS, False), _size(piece, COLS, ALIGNED)
    row = tl.load(tiles + 3 * tile + 1) * BM + tl.arange(0, BM)
    col = tl.load(tiles + 3 * tile + 2) * BN + tl.arange(0, BN)
    at = row[:, None].to(tl.int64) * cols + col[None, :]
    mask = (row[:, None] < rows) & (col[None, :] < cols)

    p_pointer = _pointer(piece, P, WEIGHT, ALIGNED) + at
    p = tl.load(p_pointer, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(_pointer(piece, G, WEIGHT, ALIGNED) + at, mask=mask, other=0.0).to(tl.float32)
    m_pointer = _pointer(piece, M, MOMENT, ALIGNED) + at
    v_pointer = _pointer(piece, V, MOMENT, ALIGNED) + at
    m = beta1 * tl.load(m_pointer, mask=mask, other=0.0).to(tl.float32) + rest1 * g
    v = beta2 * tl.load(v_pointer, mask=mask, other=0.0).to(tl.float32) + rest2 * g * g
    tl.store(m_pointer, m.to(MOMENT), mask=mask)
    tl.store(v_pointer, v.to(MOMENT), mask=mask)
    exact = -decay * p - step_size * m / (tl.sqrt(v) / root_correction + eps)
    if IN_PLACE:
        moved = (p + exact).to(WEIGHT)
        tl.store(p_pointer, moved, mask=mask)
        step = moved.to(tl.float32) - p
    else:
        rounded = exact.to(WEIGHT)
        tl.store(_pointer(piece, STEP, WEIGHT, ALIGNED) + at, rounded, mask=mask)
        step = rounded.to(tl.float32)
    step = tl.where(mask, step, 0.0)
    tl.store(norms + tile, tl.sum(step * step))

    part = tl.arange(0, N)
    rank = tl.load(piece + RANK).to(tl.int32)
    height = _size(piece, ROWS, ALIGNED)
    operand = step.to(DOT)
    for first in range(0, count, N):
        total = tl.zeros((N,), tl.float32)
        end = tl.minimum(first + N, count) * rank
        for start in range(first * rank, end, BK):
            k = start + tl.arange(0, BK)
            left = _factor(_pointer(piece, LEFT, FACTOR, ALIGNED), k, end, row, height)
            right = _factor(_pointer(piece, RIGHT, FACTOR, ALIGNED), k, end, col, cols)
            image = tl.dot(left.to(DOT), operand, input_precision=PRECISION)
            seen = tl.sum(image * right.to(tl.float32), 1)
            owner = (k // rank - first)[:, None] == part[None, :]
            total += tl.sum(tl.where(owner, seen[:, None], 0.0), 0)
        tl.store(partials + tile * count + first + part, total, mask=first + part < count)


@triton.jit(
    do_not_specialize=["count", "seed", "step_number"], do_not_specialize_on_alignment=["weights"]
)
def apply(
    pieces,
    tiles,
    weights,
    count,
    seed: tl.int64,
    step_number: tl.int64,
    WEIGHT: tl.constexpr,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDING: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Pass 2 of one tile. ``weights`` is a, (count,), fp32."""
    tile = tl.program_id(0).to(tl.int64)
    piece = pieces + tl.load(tiles + 3 * tile).to(tl.int64) * STRIDE
    rows, cols = _size(piece, ROWS, False), _size(piece, COLS, ALIGNED)
    col_block = tl.load(tiles + 3 * tile + 2)
    row = tl.load(tiles + 3 * tile + 1) * BM + tl.arange(0, BM)
    col = col_block * BN + tl.arange(0, BN)
    at = row[:, None].to(tl.int64) * cols + col[None, :]
    mask = (row[:, None] < rows) & (col[None, :] < cols)

    removed = tl.zeros((BM, BN), tl.float32)
    rank = tl.load(piece + RANK).to(tl.int32)
    ranks = rank * count
    height = _size(piece, ROWS, ALIGNED)
    for start in range(0, ranks, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(weights + k // rank, mask=k < ranks, other=0.0)
        left = _factor(_pointer(piece, LEFT, FACTOR, ALIGNED), k, ranks, row, height)
        right = _factor(_pointer(piece, RIGHT, FACTOR, ALIGNED), k, ranks, col, cols)
        scaled = tl.trans(left.to(tl.float32) * a[:, None])
        removed = tl.dot(scaled, right.to(tl.float32), removed, input_precision=PRECISION)

    p_pointer = _pointer(piece, P, WEIGHT, ALIGNED) + at
    p = tl.load(p_pointer, mask=mask, other=0.0).to(tl.float32)
    change = -removed
    if not IN_PLACE:
        step = tl.load(_pointer(piece, STEP, WEIGHT, ALIGNED) + at, mask=mask, other=0.0)
        change += step.to(tl.float32)
    if ROUNDING == STOCHASTIC:
        index = tl.load(piece + INDEX)
        bits = random_bits(row, col_block, (cols + 3) // 4, index, seed, step_number, BN)
        tl.store(p_pointer, stochastic(p + change, bits), mask=mask)
    elif ROUNDING == KAHAN:
        owed_pointer = _pointer(piece, COMPENSATION, WEIGHT, ALIGNED) + at
        owed = change + tl.load(owed_pointer, mask=mask, other=0.0).to(tl.float32)
        rounded = (p + owed).to(WEIGHT)
        tl.store(p_pointer, rounded, mask=mask)
        tl.store(owed_pointer, (owed - (rounded.to(tl.float32) - p)).to(WEIGHT), mask=mask)
    else:
        tl.store(p_pointer, (p + change).to(WEIGHT), mask=mask)
