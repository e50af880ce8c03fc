from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeopt.geometry.moves import Eigenbasis, capped_retraction, retraction_weights


def gram_of(n: int, p: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.randn(n, p, dtype=torch.float64)
    return g, g @ g.T


@given(n=st.integers(1, 12), seed=st.integers(0, 2**31), damping=st.floats(1e-3, 10))
@settings(max_examples=100, deadline=None)
def test_retraction_meets_the_optimality_conditions(n: int, seed: int, damping: float) -> None:
    torch.manual_seed(seed)
    _, gram = gram_of(n, 2 * n)
    violation = torch.randn(n, dtype=torch.float64).clamp(min=0)
    weights = retraction_weights(gram, violation, damping)
    ridge = damping * gram.trace() / n
    slope = gram @ weights + ridge * weights - violation
    assert bool((weights >= 0).all())
    assert bool((slope >= -1e-9).all())
    assert abs(float(slope @ weights)) <= 1e-9


def test_retraction_undoes_the_violation_when_undamped() -> None:
    g, gram = gram_of(4, 50)
    violation = (gram @ (1 + torch.rand(4, dtype=torch.float64))).clamp(min=0)
    weights = retraction_weights(gram, violation, 1e-9)
    torch.testing.assert_close(g @ (-g.T @ weights), -violation, rtol=1e-6, atol=1e-8)


def test_no_violation_no_retraction() -> None:
    _, gram = gram_of(3, 9)
    assert not retraction_weights(gram, torch.zeros(3, dtype=torch.float64), 0.1).any()


@pytest.mark.parametrize("with_momentum", [True, False])
def test_capped_retraction_in_full_space(with_momentum: bool) -> None:
    g, gram = gram_of(5, 40)
    m = torch.randn(40, dtype=torch.float64)
    weights = torch.rand(5, dtype=torch.float64)
    along = g @ m if with_momentum else None
    free = capped_retraction(gram, weights, along, float(m.norm()), cap=math.inf)
    v = -g.T @ free.weights + free.along * m
    assert float(v.norm()) == pytest.approx(free.norm)
    if with_momentum:
        assert float(v @ m) == pytest.approx(0.0, abs=1e-9)
    else:
        assert free.along == 0.0
    capped = capped_retraction(gram, weights, along, float(m.norm()), cap=0.25 * free.norm)
    assert capped.norm == pytest.approx(0.25 * free.norm)
    torch.testing.assert_close(-g.T @ capped.weights + capped.along * m, 0.25 * v)


def test_eigenbasis_keeps_what_is_asked() -> None:
    values = torch.tensor([4.0, 1.0, 1e-3, 1e-6], dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    gram = q @ values.diag() @ q.T
    assert len(Eigenbasis.of(gram, None, 1e-4).values) == 3
    assert len(Eigenbasis.of(gram, 2, 1e-4).values) == 2
    assert len(Eigenbasis.of(torch.zeros_like(gram), None, 1e-4).values) == 0


def test_component_norm_equals_the_projection() -> None:
    g, gram = gram_of(4, 30)
    step = torch.randn(30, dtype=torch.float64)
    basis = torch.linalg.qr(g.T).Q
    eigenbasis = Eigenbasis.of(gram, None, 1e-12)
    assert eigenbasis.component_norm(g @ step) == pytest.approx(float((basis.T @ step).norm()))
