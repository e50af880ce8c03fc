"""Certificates: how much energy a subspace captures, with a bound that extra probes give.

A basis that was fitted to some anchors captures those anchors' energy by construction. What counts
is the energy of vectors that it has not seen. Both certificates here look at fresh probes and
state a lower bound that holds with a given probability, at any number of probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Evidence = Literal["held-out", "random"]
MatVec = Callable[[Tensor], Tensor]

_ROUNDING = 1e-3  # energies of float32 bases may exceed the whole by this share


@dataclass(frozen=True)
class Certificate:
    """Share of the energy that a subspace captures.

    Attributes:
        captured: the estimate, in [0, 1].
        lower_bound: the true share is at least this with probability ``confidence``.
        confidence: probability, over the draw of the probes, that the bound holds.
        probes: number of fresh probes.
        evidence: "held-out" for anchors that the basis was not fitted to, "random" for random
            vectors put through an operator.
    """

    captured: float
    lower_bound: float
    confidence: float
    probes: int
    evidence: Evidence

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file's header."""
        return asdict(self)


def certify_held_out(captured: Tensor, total: Tensor, *, confidence: float = 0.95) -> Certificate:
    """Certify a basis on anchors that it was not fitted to.

    The shares x_i = captured_i / total_i lie in [0, 1], so for independent probes their mean
    exceeds the true mean m with n kl(mean, m) >= ln(1 / (1 - confidence)) at most with
    probability 1 - confidence (Hoeffding 1963, theorem 1); kl is the divergence of two coins.

    Args:
        captured: energy inside the subspace of each held-out anchor, ||Q^T x||^2 summed over its
            vectors, (n,).
        total: the whole energy ||x||^2 of each, (n,), greater than 0.
        confidence: probability that the bound is to hold.

    Raises:
        ValueError: no probes, shapes that differ, or energies that no projection gives.
    """
    _check_confidence(confidence)
    if captured.shape != total.shape or captured.ndim != 1 or len(captured) == 0:
        raise ValueError(
            f"captured and total must be two non-empty vectors of one length, got shapes "
            f"{tuple(captured.shape)} and {tuple(total.shape)}"
        )
    if not bool((total > 0).all()):
        raise ValueError("every total energy must be greater than 0; leave empty probes out")
    shares = captured.double() / total.double()
    if not bool(((shares >= -_ROUNDING) & (shares <= 1 + _ROUNDING)).all()):
        raise ValueError(
            f"a captured energy is {float(shares.min()):.3g} to {float(shares.max()):.3g} of its "
            "total: the basis is not orthonormal"
        )
    mean = float(shares.clamp(0, 1).mean())
    lower = _lower_mean(mean, len(shares), 1 - confidence)
    return Certificate(mean, lower, confidence, len(shares), "held-out")


def certify_operator(
    matvec: MatVec,
    basis: Tensor,
    *,
    probes: int = 30,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> Certificate:
    """Certify a basis of a positive semi-definite operator A with Gaussian probes.

    The captured energy tr(U^T A U) takes k products and is exact. The energy left out,
    tr(R) for R = (I - U U^T) A (I - U U^T), is the mean of z^T R z; whatever the spectrum of R,
    that mean falls below x tr(R) with probability at most (x e^(1-x))^(n/2), because
    E exp(-s z^T R z) = prod (1 + 2 s lambda_i)^(-1/2) <= (1 + 2 s tr(R))^(-1/2).

    Args:
        matvec: v -> A v on flat vectors, (P,).
        basis: orthonormal U, (P, k); made without these probes.
        probes: n, products spent on the part left out.
        confidence: probability that the bound is to hold.
        generator: source of the probes, on the basis' device; the global one by default.

    Raises:
        ValueError: settings out of range, or a basis that is not orthonormal.
    """
    _check_confidence(confidence)
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    _check_orthonormal(basis)
    inside = sum(float(u @ matvec(u)) for u in basis.T)
    outside = 0.0
    for _ in range(probes):
        z = torch.randn(len(basis), generator=generator, dtype=basis.dtype, device=basis.device)
        z = z - basis @ (basis.T @ z)
        outside += max(0.0, float(z @ matvec(z))) / probes
    worst = outside / _lower_tail(probes, 1 - confidence)
    return Certificate(_share(inside, outside), _share(inside, worst), confidence, probes, "random")


def _share(inside: float, outside: float) -> float:
    return inside / (inside + outside) if inside > 0 else 0.0


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")


def _check_orthonormal(basis: Tensor) -> None:
    identity = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    error = float((basis.T @ basis - identity).abs().max())
    if not error <= _ROUNDING:
        raise ValueError(
            f"the basis is not orthonormal (U^T U differs from I by {error:.3g}); "
            "take the Q of torch.linalg.qr(basis)"
        )


def _coin_divergence(mean: float, other: float) -> float:
    """The divergence kl(mean, other) of two coins, from the first."""
    head = mean * math.log(mean / other) if mean > 0 else 0.0
    tail = (1 - mean) * math.log((1 - mean) / (1 - other)) if mean < 1 else 0.0
    return head + tail


def _lower_mean(mean: float, count: int, risk: float) -> float:
    """The smallest m <= mean with count kl(mean, m) <= ln(1 / risk)."""
    return _bisect(lambda m: count * _coin_divergence(mean, m) - math.log(1 / risk), mean)


def _lower_tail(count: int, risk: float) -> float:
    """The x in (0, 1) with (x e^(1-x))^(count/2) = risk."""
    return _bisect(lambda x: -0.5 * count * (math.log(x) + 1 - x) - math.log(1 / risk), 1.0)


def _bisect(falling: Callable[[float], float], high: float) -> float:
    """The root in (0, high) of a function that falls from a positive value; 0 if there is none."""
    low = 0.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        if middle <= 0:
            return 0.0
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return low
