"""The small matrix problems behind tangent and retraction. All of them are N x N."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

BRAKE_FLOOR = 0.1


def check_finite_products(products: Tensor) -> None:
    """Raise if products of anchor gradients are NaN or infinite: eigensolvers fail obscurely."""
    if not bool(torch.isfinite(products).all()):
        raise FloatingPointError(
            "an anchor's gradient is not finite although its loss is: the backward pass divides by "
            "zero or overflows at these weights (sqrt and norms of zero do); go back to the last "
            "good checkpoint, lower the learning rate or compute in a wider precision"
        )


@dataclass(frozen=True)
class Eigenbasis:
    """The kept eigenpairs of the Gram matrix, K = V Omega V^T.

    Attributes:
        values: Omega, largest first, (k,).
        vectors: V, (N, k).
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, gram: Tensor, rank: int | None, floor: float) -> Eigenbasis:
        """Keep the top ``rank`` eigenpairs above ``floor`` times the largest eigenvalue.

        Raises:
            FloatingPointError: the Gram matrix is not finite.
        """
        check_finite_products(gram)
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0), vectors.flip(1)
        keep = values > floor * values[0].clamp(min=torch.finfo(values.dtype).tiny)
        return cls(values[keep][:rank], vectors[:, keep][:, :rank])

    def tangent_weights(self, coefficients: Tensor) -> Tensor:
        """Return a = V Omega^-1 V^T c, so that s - G^T a has no velocity into M, (N,).

        Args:
            coefficients: c = G s, (N,).
        """
        return self.vectors @ ((self.vectors.T @ coefficients) / self.values)

    def component_norm(self, coefficients: Tensor) -> float:
        """Return ||U^T s|| for c = G s, with U = G^T V Omega^(-1/2)."""
        return float(((self.vectors.T @ coefficients) / self.values.sqrt()).norm())


def retraction_weights(gram: Tensor, violation: Tensor, damping: float) -> Tensor:
    """Weights a >= 0 of the damped minimum-norm Gauss-Newton step v = -G^T a, (N,).

    Minimises 1/2 a^T (K + mu tr(K)/N I) a - r^T a over a >= 0: where no bound is active,
    (K + mu tr(K)/N I) a = r.

    Args:
        gram: K, (N, N), float64.
        violation: r = max(0, l - tau), (N,), nats.
        damping: mu.
    """
    violation = violation.to(gram)
    ridge = damping * gram.trace() / len(gram)
    if not bool((violation > 0).any()) or float(ridge) <= 0:
        return torch.zeros_like(violation)
    system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return _nonnegative_solve(system, violation)


def _nonnegative_solve(system: Tensor, target: Tensor) -> Tensor:
    """Minimise 1/2 a^T A a - b^T a over a >= 0 (Lawson and Hanson's active set, 1974)."""
    solution = torch.zeros_like(target)
    active = torch.zeros_like(target, dtype=torch.bool)
    tolerance = 1e-12 * float(target.abs().max())
    for _ in range(3 * len(target)):
        slope = (target - system @ solution).masked_fill(active, -math.inf)
        if float(slope.max()) <= tolerance:
            break
        active[slope.argmax()] = True
        solution = _step_to_feasible(system, target, solution, active)
    return solution


def _step_to_feasible(system: Tensor, target: Tensor, start: Tensor, active: Tensor) -> Tensor:
    """Move to the minimiser on the active set, dropping coordinates that would turn negative."""
    solution = start
    while True:
        candidate = torch.zeros_like(target)
        rows = system[active][:, active]
        candidate[active] = torch.linalg.solve(rows, target[active])
        blocked = active & (candidate < 0)
        if not bool(blocked.any()):
            return candidate
        ratio = torch.where(blocked, solution / (solution - candidate), torch.inf)
        first = int(ratio.argmin())
        solution = solution + ratio[first] * (candidate - solution)
        active[first] = False
        solution = solution.clamp(min=0).masked_fill(~active, 0.0)


def next_brake(brake: float, violation: float, limit: float) -> float:
    """Factor on the learning rate until the next refresh: a trust region for the tangent move.

    f <- f min(1.3, sqrt(limit / violation)), kept within [0.1, 1]. The tangent move leaves the
    anchors a second-order change, which grows with the square of the step's length; hence the
    root. The floor keeps the task going, and the 1.3 lets go slowly of what was just too much.

    Args:
        brake: f until now.
        violation: mean violation found at this refresh, nats.
        limit: violation that is small enough, nats.

    Warns:
        UserWarning: f is at its floor already, and the violation above the limit.
    """
    if brake <= BRAKE_FLOOR and violation > limit:
        warnings.warn(
            "the guard holds the learning rate at a tenth, and anchors still move by more than "
            "step_limit between two refreshes: lower the learning rate or refresh_every, or set "
            "step_limit=None if the task is not learned and anchors may drift in mid-run",
            stacklevel=3,
        )
    change = math.sqrt(limit / violation) if violation > 0 else math.inf
    return min(1.0, max(BRAKE_FLOOR, brake * min(1.3, change)))


@dataclass(frozen=True)
class Retraction:
    """A retraction v = -G^T weights + along m, with m the optimizer's momentum.

    Attributes:
        weights: a, (N,).
        along: beta, the multiple of m added so that v does not climb the task loss.
        norm: ||v||.
    """

    weights: Tensor
    along: float
    norm: float


def capped_retraction(
    gram: Tensor,
    weights: Tensor,
    momentum_coefficients: Tensor | None,
    momentum_norm: float,
    cap: float,
) -> Retraction:
    """Make -G^T a orthogonal to the momentum and no longer than ``cap``.

    v = -G^T a + beta m with beta = a . (G m) / ||m||^2, hence v . m = 0 and
    ||v||^2 = a^T K a - beta^2 ||m||^2.

    Args:
        gram: K, (N, N).
        weights: a, (N,).
        momentum_coefficients: G m, (N,); None leaves v as it is.
        momentum_norm: ||m||.
        cap: largest allowed ||v||.
    """
    beta = 0.0
    if momentum_coefficients is not None and momentum_norm > 0:
        beta = float(weights @ momentum_coefficients) / momentum_norm**2
    norm = math.sqrt(max(0.0, float(weights @ gram @ weights) - (beta * momentum_norm) ** 2))
    scale = min(1.0, cap / norm) if norm > 0 else 0.0
    return Retraction(weights * scale, beta * scale, norm * scale)
