"""K1 in Triton's interpreter against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeopt_kernels import lowrank, reference
from safeopt_kernels.settings import AdamW, Rounding, Seed
from safeopt_kernels.specialisations import roundings_of
from safeopt_kernels.table import Piece
from tests.kernels.interpreted.pieces import ULP, random_piece

KINDS = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
RAGGED = [(1, 1), (15, 17), (37, 200), (0, 5), (1, 300), (64, 128), (16, 16)]
ADAMW = AdamW(lr=1e-2, weight_decay=0.1, step=3)


def error(found: Tensor, truth: Tensor, terms: Tensor) -> float:
    """Largest error over the largest sum of the terms' sizes: terms may cancel, errors do not."""
    if truth.numel() == 0:
        return 0.0
    worst = (found.double() - truth).abs().max() / terms.abs().max().clamp(min=1e-30)
    return float(worst.nan_to_num(nan=torch.inf))


def bound_of(dtype: torch.dtype) -> float:
    """Error of arithmetic in fp32 that is stored in a dtype."""
    return (ULP[dtype] if dtype != torch.float32 else 0.0) + 4 * ULP[torch.float32]


def sizes_of_terms(piece: Piece, adamw: AdamW) -> tuple[Tensor, Tensor, Tensor]:
    """Of m, v and the step: with weights, gradients and m above zero no two terms cancel."""
    m, v = piece.m.double().abs(), piece.v.double()
    step = reference.propose_(piece.p.abs(), piece.g.abs(), m, v, adamw)
    return m, v, step.abs()


def check_propose(pieces: list[Piece], count: int, adamw: AdamW) -> None:
    truths = []
    for piece in pieces:
        m, v = piece.m.double(), piece.v.double()
        truths.append((m, v, reference.propose_(piece.p, piece.g, m, v, adamw)))
    sizes = [sizes_of_terms(piece, adamw) for piece in pieces]
    before = [piece.p.double() for piece in pieces]
    c, squared_norm = lowrank.propose(pieces, count, adamw)
    expected, scale = torch.zeros(count, dtype=torch.float64), 1e-30
    total = 0.0
    for piece, p, (m, v, step), (of_m, of_v, of_step) in zip(
        pieces, before, truths, sizes, strict=True
    ):
        assert error(piece.m, m, of_m) < bound_of(piece.m.dtype)
        assert error(piece.v, v, of_v) < bound_of(piece.v.dtype)
        bound = bound_of(piece.p.dtype)
        if piece.step is None:
            assert error(piece.p, p + step, p.abs() + of_step) < bound
            stored = piece.p.double() - p
        else:
            assert torch.equal(piece.p.double(), p)
            assert error(piece.step, step, of_step) < bound
            stored = piece.step.double()
        total += float(stored.square().sum())
        if piece.left is not None:
            expected += reference.coefficients(stored, piece.left, piece.right)
            scale += float(stored.norm() * piece.left.double().norm() * piece.right.double().norm())
    assert float((c - expected).abs().max()) < 4 * ULP[torch.float32] * scale
    assert float(squared_norm) == pytest.approx(total, rel=1e-6)


def check_apply(pieces: list[Piece], weights: Tensor, rounding: Rounding, seed: Seed) -> None:
    before = [(piece.p.clone(), piece.compensation.clone()) for piece in pieces]
    lowrank.apply(pieces, weights, rounding, seed)
    for piece, (p, owed) in zip(pieces, before, strict=True):
        change = (
            torch.zeros_like(p, dtype=torch.float64) if piece.step is None else piece.step.double()
        )
        if piece.left is not None:
            change = change - reference.low_rank(piece.left, piece.right, weights)
        exact, stored = p.double() + change, piece.p.double()
        ulp = ULP[p.dtype]
        if rounding == "kahan":
            # What p lost is in the compensation, in the dtype of p, up to its own rounding.
            exact, stored = exact + owed.double(), stored + piece.compensation.double()
            ulp = ulp * ulp
        terms = p.double().abs() + change.abs()
        assert error(stored, exact, terms) < ulp + 16 * ULP[torch.float32]


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shapes=st.lists(
        st.sampled_from(RAGGED) | st.tuples(st.integers(0, 70), st.integers(0, 140)),
        min_size=1,
        max_size=3,
    ),
    ranks=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    count=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    in_place=st.booleans(),
    data=st.data(),
)
def test_random_lists(
    kind: tuple[torch.dtype, torch.dtype],
    shapes: list[tuple[int, int]],
    ranks: list[int],
    count: int,
    seed: int,
    in_place: bool,
    data: st.DataObject,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pieces = [
        random_piece(generator, shape, rank, count, *kind, index=i, in_place=in_place)
        for i, (shape, rank) in enumerate(zip(shapes, ranks, strict=False))
    ]
    check_propose(pieces, count, ADAMW)
    weights = 1e-3 * torch.randn(count, generator=generator, dtype=torch.float64)
    roundings = ("nearest",) if in_place else roundings_of(kind[0])
    check_apply(pieces, weights, data.draw(st.sampled_from(roundings)), Seed(seed, 3))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_ragged_shapes(kind: tuple[torch.dtype, torch.dtype]) -> None:
    generator = torch.Generator().manual_seed(0)
    pieces = [
        random_piece(generator, shape, index % 4, 3, *kind, index=index)
        for index, shape in enumerate(RAGGED)
    ]
    check_propose(pieces, 3, ADAMW)
    for rounding in roundings_of(kind[0]):
        check_apply(pieces, torch.tensor([1e-3, -2e-3, 0.0]).double(), rounding, Seed(5, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_moments_in_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    pieces = [
        random_piece(generator, shape, 2, 3, dtype, torch.float32, in_place=True, moment=dtype)
        for shape in RAGGED
    ]
    check_propose(pieces, 3, ADAMW)


@pytest.mark.parametrize("count", [64, 65, 150])
def test_more_parts_than_a_program_adds_up_at_once(count: int) -> None:
    generator = torch.Generator().manual_seed(7)
    pieces = [
        random_piece(generator, (17, 40), rank, count, torch.float32, torch.float32)
        for rank in (3, 0, 1)
    ]
    check_propose(pieces, count, ADAMW)


def test_aligned_and_other_addresses_agree() -> None:
    generator = torch.Generator().manual_seed(1)
    piece = random_piece(generator, (32, 48), 2, 4, torch.float32, torch.float32)
    shifted = torch.empty(32 * 48 + 1)[1:].view(32, 48).copy_(piece.p)
    other = Piece(shifted, piece.step.clone(), piece.g, piece.m.clone(), piece.v.clone(),
                  piece.left, piece.right)  # fmt: skip
    assert piece.is_aligned()
    assert not other.is_aligned()
    results = [lowrank.propose([x], 4, ADAMW) for x in (piece, other)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(piece.step, other.step)


def test_stochastic_rounding_is_the_reference_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(2)
    pieces = [
        random_piece(generator, shape, 0, 1, torch.bfloat16, torch.bfloat16, index=index)
        for index, shape in enumerate([(37, 201), (3, 5)])
    ]
    lowrank.propose(pieces, 1, ADAMW)
    seed = Seed(2**40 + 17, 9)
    expected = [piece.p.clone() for piece in pieces]
    for piece, p in zip(pieces, expected, strict=True):
        reference.store_stochastic(p, piece.step.float(), seed, piece.index)
    lowrank.apply(pieces, torch.zeros(1), "stochastic", seed)
    for piece, p in zip(pieces, expected, strict=True):
        assert torch.equal(piece.p, p)
