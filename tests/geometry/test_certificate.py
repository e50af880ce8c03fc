"""Certificates: the bound holds as often as it says, and is of use."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from safeopt.geometry.certificate import (
    _lower_mean,
    _lower_tail,
    certify_held_out,
    certify_operator,
)

TRIALS = 400


def too_many(risk: float) -> int:
    """Failures that TRIALS honest bounds exceed with a probability below 1e-4."""
    return math.ceil(TRIALS * risk + 4 * math.sqrt(TRIALS * risk * (1 - risk)))


@pytest.mark.parametrize("probes", [4, 16, 64])
@pytest.mark.parametrize("concentration", [(9.0, 1.0), (0.5, 0.5), (200.0, 2.0)])
def test_held_out_bound_holds(probes: int, concentration: tuple[float, float]) -> None:
    a, b = concentration
    shares = torch.distributions.Beta(
        torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    ).sample((TRIALS, probes))
    total = torch.rand(TRIALS, probes, dtype=torch.float64) + 0.1
    made = [certify_held_out(s * t, t, confidence=0.9) for s, t in zip(shares, total, strict=True)]
    assert sum(c.lower_bound > a / (a + b) for c in made) <= too_many(0.1)
    for certificate, row in zip(made, shares, strict=True):
        assert certificate.captured == pytest.approx(float(row.mean()), abs=1e-12)
        assert 0 <= certificate.lower_bound < certificate.captured


def test_all_captured_leaves_the_bound_of_a_coin_never_seen_to_fail() -> None:
    ones = torch.ones(20)
    assert certify_held_out(ones, ones).lower_bound == pytest.approx(0.05 ** (1 / 20), abs=1e-9)


def test_nothing_captured_certifies_nothing() -> None:
    certificate = certify_held_out(torch.zeros(20), torch.ones(20))
    assert certificate.captured == certificate.lower_bound == 0.0


def test_bounds_solve_their_equations() -> None:
    m = _lower_mean(0.8, 12, 0.05)
    divergence = 0.8 * math.log(0.8 / m) + 0.2 * math.log(0.2 / (1 - m))
    assert 12 * divergence == pytest.approx(math.log(20), rel=1e-9)
    x = _lower_tail(12, 0.05)
    assert (x * math.exp(1 - x)) ** 6 == pytest.approx(0.05, rel=1e-9)


def psd(values: Tensor) -> tuple[Tensor, Tensor]:
    """A random symmetric matrix with these eigenvalues, and its eigenvectors."""
    vectors, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return (vectors * values) @ vectors.T, vectors


@pytest.mark.parametrize("tail", ["one direction", "flat"])
def test_operator_bound_holds_for_any_tail(tail: str) -> None:
    values = torch.zeros(30, dtype=torch.float64)
    values[:4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    if tail == "flat":
        values[4:] = 0.1
    else:
        values[4] = 2.6  # the worst case of the bound: all that is left out lies in one direction
    matrix, vectors = psd(values)
    truth = float(values[:4].sum() / values.sum())
    made = [
        certify_operator(lambda v: matrix @ v, vectors[:, :4], probes=10, confidence=0.9)
        for _ in range(TRIALS)
    ]
    assert sum(c.lower_bound > truth for c in made) <= too_many(0.1)
    assert all(c.lower_bound <= c.captured for c in made)


def test_more_probes_tighten_the_bound() -> None:
    values = torch.logspace(0, -3, 40, dtype=torch.float64)
    matrix, vectors = psd(values)
    truth = float(values[:8].sum() / values.sum())
    draw = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    certificate = certify_operator(
        lambda v: matrix @ v, vectors[:, :8], probes=3000, generator=draw
    )
    assert certificate.captured == pytest.approx(truth, abs=0.02)
    assert truth - 0.05 < certificate.lower_bound < truth


def test_a_perfect_basis_captures_all() -> None:
    matrix, vectors = psd(torch.tensor([3.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    certificate = certify_operator(lambda v: matrix @ v, vectors[:, :2])
    assert certificate.lower_bound == pytest.approx(1.0, abs=1e-9)


def test_errors_say_what_to_pass() -> None:
    ones = torch.ones(3)
    with pytest.raises(ValueError, match="one length"):
        certify_held_out(ones, torch.ones(4))
    with pytest.raises(ValueError, match="not orthonormal"):
        certify_held_out(2 * ones, ones)
    with pytest.raises(ValueError, match="greater than 0"):
        certify_held_out(ones, torch.zeros(3))
    with pytest.raises(ValueError, match="between 0 and 1"):
        certify_held_out(ones, ones, confidence=95)
    with pytest.raises(ValueError, match=r"torch\.linalg\.qr"):
        certify_operator(lambda v: v, torch.ones(4, 2))
    with pytest.raises(ValueError, match="probes"):
        certify_operator(lambda v: v, torch.eye(4)[:, :2], probes=0)
