from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeopt.geometry.compression import Factors, compress


def token_factors(anchors: int, tokens: int, m: int, n: int, decay: float = 1.0) -> Factors:
    scale = torch.exp(-decay * torch.arange(tokens))[:, None]
    return Factors(torch.randn(anchors, tokens, m) * scale, torch.randn(anchors, tokens, n))


def dense(factors: Factors) -> torch.Tensor:
    return factors.left.double().mT @ factors.right.double()


@given(
    anchors=st.integers(1, 4),
    tokens=st.integers(1, 20),
    m=st.integers(1, 30),
    n=st.integers(1, 30),
    rank=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_loses_hardly_more_than_the_optimum(
    anchors: int, tokens: int, m: int, n: int, rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    factors = token_factors(anchors, tokens, m, n)
    truth = dense(factors)
    (compressed,) = compress([factors], rank)
    singular = torch.linalg.svdvals(truth)
    optimum = singular[:, rank:].square().sum(1)
    lost = (dense(compressed) - truth).square().sum((1, 2))
    total = truth.square().sum((1, 2))
    assert compressed.left.shape[1] == min(tokens, rank)
    assert bool((lost <= 1.1 * optimum + 1e-6 * total).all())
    assert compressed.energy is not None
    torch.testing.assert_close(compressed.energy.double(), total, rtol=1e-4, atol=1e-10)


def test_kept_and_lost_energy_add_up() -> None:
    factors = token_factors(3, 40, 25, 30, decay=0.05)
    (compressed,) = compress([factors], 4)
    assert compressed.energy is not None
    kept, lost = dense(compressed), dense(factors) - dense(compressed)
    total = kept.square().sum((1, 2)) + lost.square().sum((1, 2))
    torch.testing.assert_close(total, compressed.energy.double(), rtol=1e-4, atol=0)


def test_order_and_mixed_shapes_are_kept() -> None:
    many = [token_factors(2, t, m, n) for t, m, n in [(9, 5, 7), (12, 6, 4), (9, 3, 8), (2, 5, 5)]]
    for before, after in zip(many, compress(many, 3), strict=True):
        assert after.left.shape[-1] == before.left.shape[-1]
        assert after.right.shape[-1] == before.right.shape[-1]
        assert float((dense(after) - dense(before)).norm() / dense(before).norm()) < 0.2


@pytest.mark.parametrize("rank", [1, 5])
def test_a_zero_gradient_stays_zero(rank: int) -> None:
    factors = Factors(torch.zeros(2, 9, 4), torch.randn(2, 9, 6))
    (compressed,) = compress([factors], rank)
    assert torch.equal(dense(compressed), torch.zeros(2, 4, 6, dtype=torch.float64))
