"""Four uses of second order in a guard that the ablation compares with the fixed schedule.

Each looks at the anchors once more per refresh, one step after it, by a forward pass alone: what
the loss of anchor i has gained beyond first order, g_i = l_i(theta + d) - l_i(theta) - G_i d, is
half its acceleration along d, and after a path x times as long it is about x^2 g_i.

- ``probe: refresh`` ends the period where the mean of max(0, l_i - tau_i + x^2 g_i) reaches the
  budget (`refresh_within` is the longest period).
- ``probe: retract`` retracts once, in that step, what the end of the period would find.
- ``elastic`` lets each step keep the part z of its component in the subspace that is nearest to it
  with 1/2 sum_j lambda_j z_j^2 <= elastic, lambda the anchors' Fisher eigenvalues: sharp directions
  are held and flat ones let go. It needs no extra pass.
- ``keep`` holds that many eigenvectors u_j alone: the sharpest, or ``by: coupling`` those with the
  largest lambda_j gamma_j^2, gamma_j = u_j . (H g) with g and H of the task's loss, where second
  order pushes. H g is the difference of two gradients of one batch at every refresh, which comes on
  top of the anchors' passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.collapse.methods.base import Method, Setup
from benchmarks.collapse.methods.safe import Safe
from benchmarks.collapse.suite import Batch
from safeopt import Guard
from safeopt.curvature import FiniteDifference, Hessian
from safeopt.geometry.frame import Frame
from safeopt.geometry.moves import Eigenbasis, Retraction
from safeopt.schedule import RefreshSchedule

Probe = Literal["refresh", "retract"]
By = Literal["sharpness", "coupling"]


class AimedSchedule(RefreshSchedule):
    """Takes the path at which a refresh is due from outside."""

    def aim(self, times: float) -> None:
        """Refresh before the path is ``times`` as long as it is now."""
        self._reach = times * self._path


@dataclass
class Push:
    """H g at the last refresh, where it is measured."""

    curved: dict[str, Tensor] | None = None

    def leading(self, frame: Frame, count: int) -> Eigenbasis:
        """The ``count`` eigenvectors with the largest lambda_j gamma_j^2, or lambda_j alone."""
        basis = frame.eigenbasis
        scores = basis.values.clone()
        if self.curved is not None:
            coefficients = frame.sketch.coefficients(self.curved)
            # gamma_j = u_j . (H g) with u_j = G^T v_j / sqrt(omega_j), times lambda_j = omega_j / N
            scores = (basis.vectors.T @ coefficients).square()
        best = scores.argsort(descending=True)[:count]
        return Eigenbasis(basis.values[best], basis.vectors[:, best])


class SecondOrderGuard(Guard):
    """A guard that looks one step ahead; see the module's description."""

    def __init__(
        self,
        *arguments: Any,
        probe: Probe | None = None,
        elastic: float = 0.0,
        keep: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self._keep, self.push = keep, Push()
        self._probe, self._elastic, self.looks = probe, elastic, 0
        self._first_order = torch.zeros(0)
        if probe == "refresh":
            within = settings.get("refresh_within")
            self._schedule = self._aimed = AimedSchedule(self.refresh_every, within, self.budget)

    def refresh_if_due(self, names: frozenset[str]) -> None:
        """Look ahead one step after a refresh, then refresh when due."""
        if self._probe is not None and self.basis_age == 1:
            self._look_ahead()
        super().refresh_if_due(names)

    @property
    def looks_again(self) -> bool:
        """True when the next step begins with a refresh."""
        return self._is_due

    def _look_ahead(self) -> None:
        before, anchors = self.frame.sketch.losses.double(), list(self.frame.anchors)
        # The step between has been made tangent, so that G d is what the retraction intended.
        gain = self._calibration.measure(anchors).double() - before - self._first_order
        excess = before - self.thresholds[anchors].double()
        self.looks += 1
        if self._probe == "refresh":
            self._aimed.aim(_times_until(excess, gain, self.budget))
        else:
            self.violation = (excess + gain * self.refresh_every**2).clamp(min=0)

    def _wants_retraction(self) -> bool:
        if self._probe != "retract":
            return super()._wants_retraction()
        return self.retraction and self.basis_age == 1 and bool((self.violation > 0).any())

    def retraction_for(
        self, step_norm: float, momentum_coefficients: Tensor, momentum_norm: float
    ) -> Retraction:
        """The guard's own retraction, remembered for the look ahead."""
        found = super().retraction_for(step_norm, momentum_coefficients, momentum_norm)
        self._first_order = -self.frame.gram @ found.weights + found.along * momentum_coefficients
        return found

    def tangent_weights(self, coefficients: Tensor) -> Tensor:
        """The tangent move, or its elastic form."""
        if self._keep is not None and self.tangent:
            basis = self.push.leading(self.frame, self._keep)
            return basis.tangent_weights(coefficients)
        weights = super().tangent_weights(coefficients)
        if self._elastic <= 0 or not self.tangent:
            return weights
        return elastic_weights(self.frame.eigenbasis, coefficients, self._elastic)


def elastic_weights(basis: Eigenbasis, coefficients: Tensor, budget: float) -> Tensor:
    """Weights a of the move s - G^T a that leaves z with 1/2 sum lambda_j z_j^2 = budget, (N,).

    The nearest such z to the step's own component is z_j / (1 + m lambda_j), with m found by
    bisection; all of z stays where the budget allows it.
    """
    root = basis.values.sqrt()
    z = (basis.vectors.T @ coefficients) / root
    sharpness = basis.values / len(coefficients)

    def spent(m: float) -> float:
        return float(0.5 * (sharpness * (z / (1 + m * sharpness)).square()).sum())

    if spent(0.0) <= budget:
        return torch.zeros_like(coefficients)
    low, high = 0.0, 1.0
    while spent(high) > budget:
        low, high = high, 4 * high
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    kept = z / (1 + high * sharpness)
    return basis.vectors @ ((z - kept) / root)


def _times_until(excess: Tensor, gain: Tensor, budget: float, longest: float = 1e3) -> float:
    """The smallest x >= 1 with mean(max(0, excess + x^2 gain)) above the budget."""
    x = 1.0
    while x < longest and float((excess + gain * x**2).clamp(min=0).mean()) <= budget:
        x *= 1.05
    return x


class SecondOrder(Safe):
    """SafeAdamW under a `SecondOrderGuard`; its looks count as forward rows."""

    def __init__(self, setup: Setup, guard: SecondOrderGuard, by: By = "sharpness") -> None:
        super().__init__(setup, guard)
        self._ahead, self._by = guard, by

    def step(self, batch: Batch) -> dict[str, float]:
        """See `Safe.step`."""
        looks = self._ahead.looks
        if self._by == "coupling" and self._ahead.looks_again:
            self._ahead.push.curved = self._curved(batch)
        facts = super().step(batch)
        self.spent.forward_rows += (self._ahead.looks - looks) * self._ahead.anchors_per_refresh
        return facts

    def _curved(self, batch: Batch) -> dict[str, Tensor]:
        """H g on this batch."""
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        loss = self.model(**batch).loss
        gradients = torch.autograd.grad(loss, list(named.values()))
        derivatives = FiniteDifference(self.model, check="never")
        hessian = Hessian(self.model, lambda m: m(**batch).loss, method=derivatives)
        self.spent.task_rows += 3 * len(batch["input_ids"])
        return hessian.matvec(dict(zip(named, gradients, strict=True)))


def build(setup: Setup) -> Method:
    """Options are those of `SecondOrderGuard`, and ``by``."""
    options = dict(setup.options)
    by = options.pop("by", "sharpness")
    guard = SecondOrderGuard(setup.model, setup.anchors, seed=setup.seed, **options)
    return SecondOrder(setup, guard, by)
