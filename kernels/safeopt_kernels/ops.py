"""The kernels as PyTorch operators: checked, dispatched, known to ``torch.compile``.

Every operator takes lists of (rows, cols) matrices of one dtype and works on all of them at once:
on a GPU in one launch (two, if some are aligned to 16 bytes and some are not). A vector is a matrix
of one row. A dense row of G, as that of a norm or a bias, is a factor pair with ``left`` = ones of
shape (N, 1, 1). A matrix without a low-rank part has factors of rank zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from safeopt_kernels import blocked, dispatch, native
from safeopt_kernels.settings import ROUNDINGS, AdamW, Rounding, Seed
from safeopt_kernels.table import Piece


def adamw_propose_(
    p: Sequence[Tensor],
    g: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    count: int,
    adamw: AdamW,
    step: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    r"""Update the moments, hand the steps over and look at them through the factors.

    .. math::
        c_i = \sum_{\text{matrices}} ⟨left_i^T right_i, s⟩

    Args:
        p: weights.
        g: gradients, dtype of the weights.
        m: first moments, updated.
        v: second moments, updated.
        left: factors (N, q, rows).
        right: factors (N, q, cols).
        count: N.
        adamw: scalars of the step.
        step: where the steps go, dtype of the weights; may be the gradients themselves. Without
            it the steps go into the weights, p <- p + s.

    Returns:
        c (N,) and ||s||^2, float64, of the steps as they were stored.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        RuntimeError: kernels were asked for by name and cannot run.
    """
    _check(p, {"g": g, "m": m, "v": v, "step": step}, left, right, count)
    if not p:
        return torch.zeros(count, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    result: tuple[Tensor, Tensor] = dispatch.call(
        _propose, torch.ops.safeopt_kernels.adamw_propose_, [*p, *m, *v, *step],
        list(p), list(g), list(m), list(v), list(left), list(right), list(step), count,
        adamw.lr, adamw.beta1, adamw.beta2, adamw.eps, adamw.weight_decay, adamw.step,
    )  # fmt: skip
    return result


def low_rank_apply_(
    p: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    weights: Tensor,
    step: Sequence[Tensor] = (),
    *,
    rounding: Rounding = "nearest",
    compensation: Sequence[Tensor] = (),
    seed: Seed | None = None,
    numbers: Sequence[int] | None = None,
) -> None:
    """Write p <- p + s - sum_i a_i left_i^T right_i, rounded once.

    Args:
        p: weights.
        left: factors (N, q, rows).
        right: factors (N, q, cols).
        weights: a, (N,).
        step: the steps s; none of them moves if there are none.
        rounding: "stochastic" for bfloat16, "kahan" for what has ``compensation``.
        compensation: dtype of the weights, zeros at first, updated.
        seed: of stochastic rounding.
        numbers: of the matrices, part of the seed; their places in the list by default.

    Raises:
        ValueError: shapes, dtypes or a rounding that do not belong together.
        RuntimeError: kernels were asked for by name and cannot run.
    """
    _check(p, {"step": step, "compensation": compensation}, left, right, len(weights))
    _check_rounding(p, step, rounding, compensation)
    seed = seed or Seed()
    dispatch.call(
        _apply, torch.ops.safeopt_kernels.low_rank_apply_, [*p, *compensation],
        list(p), list(left), list(right), weights, list(step), list(compensation),
        list(range(len(p)) if numbers is None else numbers),
        ROUNDINGS.index(rounding), seed.seed, seed.step,
    )  # fmt: skip


def adamw_onesided_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    basis: Tensor,
    adamw: AdamW,
    *,
    rounding: Rounding = "nearest",
    compensation: Tensor | None = None,
    seed: Seed | None = None,
) -> tuple[Tensor, Tensor]:
    """Take an AdamW step that does not move any row along a subspace, p <- p + s (I - X X^T).

    Args:
        p: weights, (rows, cols).
        g: gradient, dtype of the weights.
        m: first moment, updated.
        v: second moment, updated.
        basis: X, (cols, r), orthonormal columns.
        adamw: scalars of the step.
        rounding: "stochastic" for bfloat16, "kahan" with ``compensation``.
        compensation: dtype of the weights, zeros at first, updated.
        seed: of stochastic rounding.

    Returns:
        ||s||^2 and ||s X||^2, float64, of the step in the dtype of the weights.

    Raises:
        ValueError: shapes, dtypes or a rounding that do not belong together.
        RuntimeError: kernels were asked for by name and cannot run.
    """
    owed = [] if compensation is None else [compensation]
    lists = {"g": [g], "m": [m], "v": [v], "compensation": owed}
    _check([p], lists, [basis.new_empty(0, 0, p.shape[0])], [basis.new_empty(0, 0, p.shape[1])], 0)
    _check_narrow("basis", basis, [m])
    _check_rounding([p], [p], rounding, owed)
    if basis.dim() != 2 or basis.shape[0] != p.shape[1]:
        raise ValueError(
            f"basis must be (cols, r) for weights (rows, cols), got {tuple(basis.shape)} for "
            f"{tuple(p.shape)}"
        )
    seed = seed or Seed()
    result: tuple[Tensor, Tensor] = torch.ops.safeopt_kernels.adamw_onesided_(
        p, g, m, v, basis, owed,
        adamw.lr, adamw.beta1, adamw.beta2, adamw.eps, adamw.weight_decay, adamw.step,
        ROUNDINGS.index(rounding), seed.seed, seed.step,
    )  # fmt: skip
    return result


# -- what must hold ----------------------------------------------------------------------------


def _check(
    p: Sequence[Tensor],
    likes: Mapping[str, Sequence[Tensor]],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    count: int,
) -> None:
    """Raise if lists differ in length, matrices in shape, or factors do not fit."""
    dispatch.check_local([*p, *left, *right, *(t for ts in likes.values() for t in ts)])
    shapes = [t.shape for t in p]
    for name, tensors in likes.items():
        if tensors and [t.shape for t in tensors] != shapes:
            raise ValueError(f"{name} must have the shapes of p, matrix by matrix")
        dtypes = {t.dtype for t in (tensors if name in ("m", "v") else [*p, *tensors])}
        if len(dtypes) > 1:
            raise ValueError(f"{name} must have one dtype, that of p for all but m and v")
    moments = likes.get("m", ())
    for first, second in zip(moments, likes.get("v", ()), strict=True):
        _check_dtypes("moments", first.dtype, second.dtype, p[0].dtype)
    for weights, high, wide in zip(p, left, right, strict=True):
        _check_dtypes("factors", high.dtype, wide.dtype, weights.dtype)
        if weights.dim() != 2:
            raise ValueError(f"p must be matrices, got {tuple(weights.shape)}; use p.view(1, -1)")
        rank = high.shape[1]
        if rank:
            _check_narrow("factors", high, moments[:1])  # they are of one dtype
        rows, cols = weights.shape
        if high.shape != (count, rank, rows) or wide.shape != (count, rank, cols):
            raise ValueError(
                f"factors of a {tuple(weights.shape)} matrix must be ({count}, q, rows) and "
                f"({count}, q, cols), got {tuple(high.shape)} and {tuple(wide.shape)}"
            )


def _check_dtypes(name: str, first: torch.dtype, second: torch.dtype, weight: torch.dtype) -> None:
    """Two tensors that a kernel reads as one dtype; every form of it is compiled beforehand."""
    if first != second or first not in (torch.float32, weight):
        raise ValueError(
            f"{name} must both be float32 or both in the dtype of the weights, {weight}; "
            f"got {first} and {second}"
        )


def _check_narrow(name: str, factor: Tensor, moments: Sequence[Tensor]) -> None:
    """Forms with both in 16 bits spill registers, so there are none."""
    if any(factor.dtype.itemsize == moment.dtype.itemsize == 2 for moment in moments):
        raise ValueError(
            f"{name} in {factor.dtype} with moments in {moments[0].dtype}: one of them must be "
            f"float32; pass {name}.float(), or keep the moments in float32"
        )


def _check_rounding(
    p: Sequence[Tensor], step: Sequence[Tensor], rounding: Rounding, owed: Sequence[Tensor]
) -> None:
    if rounding == "stochastic" and any(t.dtype != torch.bfloat16 for t in p):
        raise ValueError("stochastic rounding stores bfloat16 weights: pass rounding='nearest'")
    if (rounding == "kahan") != bool(owed):
        raise ValueError("compensation goes together with rounding='kahan'")
    if rounding != "nearest" and not step:
        raise ValueError(f"rounding={rounding!r} wants the steps: pass the step of adamw_propose_")


_BUFFER = "it takes the steps in the weights, and these have a buffer of their own"

# -- operators ---------------------------------------------------------------------------------


def _propose(
    p: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    left: list[Tensor],
    right: list[Tensor],
    step: list[Tensor],
    count: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    t: int,
) -> tuple[Tensor, Tensor]:
    adamw = AdamW(lr, beta1, beta2, eps, weight_decay, t)
    c = torch.zeros(count, dtype=torch.float64, device=p[0].device)
    squared_norm = torch.zeros((), dtype=torch.float64, device=p[0].device)
    way = dispatch.implementation(
        p, [*g, *m, *v, *left, *right, *step], not_native=_BUFFER if step else None
    )
    pieces = _pieces(p, left, right, g=g, m=m, v=v, step=step)
    if way == "native":
        return native.propose(pieces, count, adamw)
    if way == "triton":
        from safeopt_kernels import lowrank

        for group in _groups(pieces):
            part, norm = lowrank.propose(group, count, adamw, backend=dispatch.backend())
            c, squared_norm = c + part, squared_norm + norm
        return c, squared_norm
    for i, weights in enumerate(p):
        target = step[i] if step else None
        seen, square = blocked.propose_(weights, g[i], m[i], v[i], left[i], right[i], adamw, target)
        c, squared_norm = c + seen, squared_norm + square
    return c, squared_norm


@torch.library.custom_op(
    "safeopt_kernels::adamw_propose_",
    _propose,
    mutates_args=("p", "m", "v", "step"),
    schema="(Tensor(a!)[] p, Tensor[] g, Tensor(b!)[] m, Tensor(c!)[] v, Tensor[] left, "
    "Tensor[] right, Tensor(d!)[] step, int count, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, int t) -> (Tensor, Tensor)",
).register_fake
def _(p: list[Tensor], *rest: object) -> tuple[Tensor, Tensor]:
    count = rest[6]
    assert isinstance(count, int)
    wide = {"dtype": torch.float64, "device": p[0].device}
    return torch.empty(count, **wide), torch.empty((), **wide)  # type: ignore[call-overload]


def _apply(
    p: list[Tensor],
    left: list[Tensor],
    right: list[Tensor],
    weights: Tensor,
    step: list[Tensor],
    compensation: list[Tensor],
    numbers: list[int],
    rounding: int,
    seed: int,
    t: int,
) -> None:
    way, bits = ROUNDINGS[rounding], Seed(seed, t)
    pieces = _pieces(p, left, right, numbers, step=step, compensation=compensation)
    chosen = dispatch.implementation(
        p, [*left, *right, *step, *compensation], not_native=_BUFFER if step else None
    )
    if chosen == "native":
        return native.apply(pieces, weights)
    if chosen == "triton":
        from safeopt_kernels import lowrank

        for group in _groups(pieces):
            lowrank.apply(group, weights, way, bits, backend=dispatch.backend())
        return None
    for piece in pieces:
        blocked.apply_(piece, weights, way, bits)
    return None


@torch.library.custom_op(
    "safeopt_kernels::low_rank_apply_",
    _apply,
    mutates_args=("p", "compensation"),
    schema="(Tensor(a!)[] p, Tensor[] left, Tensor[] right, Tensor weights, Tensor[] step, "
    "Tensor(b!)[] compensation, int[] numbers, int rounding, int seed, int t) -> ()",
).register_fake
def _(*arguments: object) -> None:
    return None


@torch.library.custom_op(
    "safeopt_kernels::adamw_onesided_",
    mutates_args=("p", "m", "v", "compensation"),
    schema="(Tensor(a!) p, Tensor g, Tensor(b!) m, Tensor(c!) v, Tensor basis, "
    "Tensor(d!)[] compensation, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, int t, int rounding, int seed, int seed_step) -> (Tensor, Tensor)",
)
def _onesided(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    basis: Tensor,
    compensation: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    t: int,
    rounding: int,
    seed: int,
    seed_step: int,
) -> tuple[Tensor, Tensor]:
    adamw = AdamW(lr, beta1, beta2, eps, weight_decay, t)
    way, bits = ROUNDINGS[rounding], Seed(seed, seed_step)
    piece = Piece(p, g=g, m=m, v=v, compensation=compensation[0] if compensation else None)
    others = [g, m, v, basis, *compensation]
    if dispatch.implementation([p], others, not_native="it has no one-sided step") == "triton":
        from safeopt_kernels import onesided

        return onesided.step(piece, basis, adamw, way, bits, backend=dispatch.backend())
    return blocked.onesided_(piece, basis, adamw, way, bits)


@_onesided.register_fake
def _(p: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    one = torch.empty((), dtype=torch.float64, device=p.device)
    return one, torch.empty_like(one)


def _pieces(
    p: list[Tensor],
    left: list[Tensor],
    right: list[Tensor],
    numbers: Sequence[int] = (),
    **others: list[Tensor],
) -> list[Piece]:
    """The matrices of a call; a factor pair of rank zero is none."""
    pieces = []
    for i, weights in enumerate(p):
        factors = {"left": left[i], "right": right[i]} if left[i].shape[1] else {}
        extra = {name: tensors[i] for name, tensors in others.items() if tensors}
        index = numbers[i] if numbers else i
        pieces.append(Piece(weights, index=index, **factors, **extra))
    return pieces


def _groups(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Split a list into what one launch can do: one alignment, one dtype of factors."""
    groups: dict[object, list[Piece]] = {}
    for piece in pieces:
        dtype = torch.float32 if piece.left is None else piece.left.dtype
        groups.setdefault((dtype, piece.is_aligned()), []).append(piece)
    yield from groups.values()
