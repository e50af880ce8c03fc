"""K2 in Triton's interpreter against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeopt_kernels import onesided, reference
from safeopt_kernels.settings import AdamW, Rounding, Seed
from safeopt_kernels.specialisations import roundings_of
from safeopt_kernels.table import Piece
from tests.kernels.interpreted.pieces import ULP, random_piece
from tests.kernels.interpreted.test_lowrank import KINDS, RAGGED, bound_of, error, sizes_of_terms

ADAMW = AdamW(lr=1e-2, weight_decay=0.1, step=2)


def random_basis(cols: int, rank: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(cols, min(rank, cols), generator=generator))
    return basis.contiguous().to(dtype)


def check(piece: Piece, basis: Tensor, rounding: Rounding, seed: Seed) -> None:
    p, owed = piece.p.double(), piece.compensation.double()
    m, v = piece.m.double(), piece.v.double()
    exact = reference.propose_(piece.p, piece.g, m, v, ADAMW)
    of_m, of_v, _ = sizes_of_terms(piece, ADAMW)
    # The kernel projects the step in the dtype of the weights, which the interpreter cuts off.
    squared_norm, along = onesided.step(piece, basis, ADAMW, rounding, seed)
    ulp, single = ULP[piece.p.dtype], ULP[torch.float32]
    assert error(piece.m, m, of_m) < bound_of(piece.m.dtype)
    assert error(piece.v, v, of_v) < bound_of(piece.v.dtype)
    stored, truth = piece.p.double(), p + reference.project_rows(exact, basis)
    slack = 4 * ulp * float(exact.abs().max()) if exact.numel() else 0.0
    if rounding == "kahan":
        stored, truth, ulp = stored + piece.compensation.double(), truth + owed, ulp * ulp
    if exact.numel():
        bound = (ulp + 16 * single) * float(truth.abs().max()) + slack
        assert float((stored - truth).abs().max().nan_to_num(nan=torch.inf)) < bound
    relative = 4 * ULP[piece.p.dtype] + 1e-5
    assert float(squared_norm) == pytest.approx(float(exact.square().sum()), rel=relative)
    expected = float((exact @ basis.double()).square().sum())
    total = float(exact.square().sum())
    assert float(along) == pytest.approx(expected, abs=relative * total, rel=relative)


@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 140)),
    rank=st.integers(1, 100),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_random_shapes(
    kind: tuple[torch.dtype, torch.dtype],
    shape: tuple[int, int],
    rank: int,
    seed: int,
    data: st.DataObject,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    piece = random_piece(generator, shape, 0, 1, *kind, index=3)
    rounding = data.draw(st.sampled_from(roundings_of(kind[0])))
    check(piece, random_basis(shape[1], rank, kind[1], seed), rounding, Seed(seed, 2))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", RAGGED)
def test_ragged_shapes(shape: tuple[int, int], kind: tuple[torch.dtype, torch.dtype]) -> None:
    for rounding in roundings_of(kind[0]):
        piece = random_piece(torch.Generator().manual_seed(0), shape, 0, 1, *kind)
        check(piece, random_basis(shape[1], 4, kind[1], 0), rounding, Seed())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_moments_in_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    piece = random_piece(generator, (37, 50), 0, 1, dtype, torch.float32, moment=dtype)
    check(piece, random_basis(50, 6, torch.float32, 5), "nearest", Seed())


@pytest.mark.parametrize("rank", [1, 16, 63, 64, 65, 150])
def test_any_rank(rank: int) -> None:
    piece = random_piece(
        torch.Generator().manual_seed(rank), (18, 200), 0, 1, torch.float32, torch.float32
    )
    check(piece, random_basis(200, rank, torch.float32, rank), "nearest", Seed())


def test_rows_do_not_move_along_the_subspace() -> None:
    generator = torch.Generator().manual_seed(4)
    piece = random_piece(generator, (50, 96), 0, 1, torch.float32, torch.float32)
    basis, before = random_basis(96, 24, torch.float32, 4), piece.p.clone()
    onesided.step(piece, basis, ADAMW)
    moved = piece.p.double() - before.double()
    assert float((moved @ basis.double()).norm() / moved.norm()) < 1e-5
    assert float(moved.norm()) > 0.1


def test_stochastic_rounding_is_the_reference_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(5)
    piece = random_piece(generator, (19, 75), 0, 1, torch.bfloat16, torch.bfloat16, index=6)
    basis = torch.zeros(75, 1, dtype=torch.bfloat16)
    m, v, p = piece.m.clone(), piece.v.clone(), piece.p.clone()
    step = reference.propose_(p, piece.g, m, v, ADAMW)
    cut = (step.view(torch.int32) & -65536).view(torch.float32)
    reference.store_stochastic(p, cut, Seed(3, 8), 6)
    onesided.step(piece, basis, ADAMW, "stochastic", Seed(3, 8))
    assert float((piece.p == p).float().mean()) > 0.99  # the steps differ in their last bits
