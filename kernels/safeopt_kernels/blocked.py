"""The primitives for the CPU: the reference, done in blocks of rows that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from safeopt_kernels import reference
from safeopt_kernels.settings import AdamW, Rounding, Seed
from safeopt_kernels.table import Piece

# Elements of a block: its weights, gradient, moments and step fit in a core's second-level cache.
_ELEMENTS = 1 << 18


def propose_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    left: Tensor,
    right: Tensor,
    adamw: AdamW,
    step: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Update m and v and hand the step over, in ``step`` or, without one, in the weights.

    Returns:
        c = G s, (N,), and ||s||^2; both of the step as it was stored.
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    image = torch.zeros(right.shape[0] * right.shape[1], p.shape[1], dtype=wide, device=p.device)
    squared_norm = 0.0
    for at in row_blocks(p):
        part = None if step is None else step[at]
        moved = _move_(p[at], g[at], m[at], v[at], adamw, part, wide)
        squared_norm += float(torch.linalg.vector_norm(moved)) ** 2
        if len(image):
            image.addmm_(left[..., at].flatten(0, 1).to(wide), moved)
    return (image.view_as(right) * right).sum((1, 2)), squared_norm


def _move_(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, adamw: AdamW, step: Tensor | None, wide: torch.dtype
) -> Tensor:
    """One block's step as it was stored, in the wide dtype."""
    if step is not None:
        step.copy_(_exact(p, g, m, v, adamw))
        return step.to(wide)
    before = p.to(wide, copy=True)
    if p.dtype == g.dtype == m.dtype == v.dtype and p.device.type == "cpu":
        _fused_(p, g, m, v, adamw)
    else:
        p.copy_(before + _exact(p, g, m, v, adamw))
    return torch.sub(p, before, out=before)


def _exact(p: Tensor, g: Tensor, m: Tensor, v: Tensor, adamw: AdamW) -> Tensor:
    """The step in at least float32; moments kept in 16 bits are rounded when they are stored."""
    wide = torch.promote_types(m.dtype, torch.float32)
    first, second = m.to(wide), v.to(wide)
    exact = reference.propose_(p, g, first, second, adamw)
    if m.dtype != wide:
        m.copy_(first)
        v.copy_(second)
    return exact


def _fused_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, adamw: AdamW) -> None:
    torch._fused_adamw_(
        [p],
        [g],
        [m],
        [v],
        [],
        [torch.tensor(float(adamw.step))],
        lr=adamw.lr,
        beta1=adamw.beta1,
        beta2=adamw.beta2,
        weight_decay=adamw.weight_decay,
        eps=adamw.eps,
        amsgrad=False,
        maximize=False,
    )


def apply_(piece: Piece, weights: Tensor, rounding: Rounding, seed: Seed) -> None:
    """Write p <- p + s - sum_i a_i G_i, rounded once."""
    p = piece.p
    wide = torch.promote_types(p.dtype, torch.float32)
    if rounding != "nearest":
        _store_(piece, slice(None), _change(piece, slice(None), weights.to(wide)), rounding, seed)
    elif p.dtype == wide and piece.step is None and piece.left is not None:
        assert piece.right is not None
        scaled = (piece.left.to(wide) * weights.to(wide)[:, None, None]).flatten(0, 1)
        p.addmm_(scaled.T, piece.right.flatten(0, 1).to(wide), alpha=-1)
    else:
        for at in row_blocks(p):
            _store_(piece, at, _change(piece, at, weights.to(wide)), rounding, seed)


def _change(piece: Piece, at: slice, weights: Tensor) -> Tensor:
    """S - sum_i a_i G_i of some rows, in the dtype of the weights a."""
    change = torch.zeros_like(piece.p[at], dtype=weights.dtype)
    if piece.step is not None:
        change += piece.step[at]
    if piece.left is not None and piece.right is not None:
        change -= reference.low_rank(piece.left[..., at], piece.right, weights)
    return change


def _store_(piece: Piece, at: slice, change: Tensor, rounding: Rounding, seed: Seed) -> None:
    if rounding == "stochastic":
        reference.store_stochastic(piece.p[at], change, seed, piece.index)
    elif rounding == "kahan":
        assert piece.compensation is not None
        reference.store_kahan(piece.p[at], change, piece.compensation[at])
    else:
        reference.store(piece.p[at], change)


def onesided_(
    piece: Piece, basis: Tensor, adamw: AdamW, rounding: Rounding, seed: Seed
) -> tuple[Tensor, Tensor]:
    """Write p <- p + s (I - X X^T); return ||s||^2 and ||s X||^2, s in the dtype of p."""
    p, g, m, v = piece.p, piece.g, piece.m, piece.v
    assert g is not None
    assert m is not None
    assert v is not None
    wide = torch.promote_types(p.dtype, torch.float32)
    basis = basis.to(wide)
    norms = torch.zeros(2, dtype=torch.float64, device=p.device)
    whole = [slice(None)] if rounding == "stochastic" else row_blocks(p)
    for at in whole:
        step = _exact(p[at], g[at], m[at], v[at], adamw).to(p.dtype).to(wide)
        image = step @ basis
        norms += torch.stack([torch.linalg.vector_norm(x).square() for x in (step, image)])
        _store_(piece, at, step - image @ basis.T, rounding, seed)
    return norms[0], norms[1].clone()


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of whole rows, about a block's worth of elements each."""
    rows, cols = matrix.shape
    height = max(1, _ELEMENTS // max(1, cols))
    for start in range(0, rows, height):
        yield slice(start, min(rows, start + height))
