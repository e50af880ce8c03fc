"""Gradient flow with and without a projector, and the drift of the anchors along it.

A system has anchor losses l_i and a task gradient g. Plain gradient descent with a small step h is
the flow theta' = -g at time t = steps * h. A projector takes the anchors' gradients out of every
step; it is measured once ("frozen") or every p steps.

The drift is u = 1/2 mean_i (l_i(theta) - l_i(theta*))^2, in nats^2. With Gamma_i = d^2 l_i / dt^2:

- no projector, g orthogonal to the anchors' gradients: u = t^4/8 mean Gamma_i^2 (the quartic
  onset); with an overlap at the start u grows as t^2 at once;
- a frozen projector: the same t^4 with Gamma_i = s^T (nabla^2 l_i) s, s the projected velocity;
- refresh every p steps: each period adds Gamma_i (p h)^2 / 2 to l_i, so u grows as (t p h)^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from safeopt.curvature import level_set_curvature
from safeopt.geometry.moves import Eigenbasis

FLOOR = 1e-8  # eigenvalues of the Gram matrix kept, relative to the largest


class Gradients(Protocol):
    """The anchors' gradients G in some representation."""

    def gram(self) -> Tensor:
        """G G^T."""

    def coefficients(self, step: Mapping[str, Tensor]) -> Tensor:
        """G s."""

    def subtract_(self, step: Mapping[str, Tensor], weights: Tensor) -> None:
        """Write s -= G^T a."""


class System(Protocol):
    """Something with anchors and a task."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The weights, moved in place."""

    def losses(self) -> Tensor:
        """Anchor losses at the present weights, (N,)."""

    def gradients(self) -> Gradients:
        """The anchors' gradients at the present weights."""

    def velocity(self) -> dict[str, Tensor]:
        """-g at the present weights."""


@dataclass(frozen=True)
class Drift:
    """Drift along one flow.

    Attributes:
        times: t, at steps spaced evenly in log t.
        values: u at these times.
        overlap: ||P g|| / ||g|| at the start, P the projector.
        predicted: mean Gamma_i^2 / 8 of the projected flow, from two forward passes at the start.
    """

    times: list[float]
    values: list[float]
    overlap: float
    predicted: float


def drift(system: System, period: int | None, *, step: float, steps: int) -> Drift:
    """Follow the flow and record the drift.

    Args:
        system: starts at the aligned point; its weights are moved.
        period: steps between two measurements of the projector; None has no projector, and
            ``steps`` or more freezes the first one.
        step: h, time of one step.
        steps: how many.
    """
    start = system.losses().double()
    wanted, times, values = set(checkpoints(steps)), [], []
    subspace, basis = _projector(system)
    overlap, predicted = _at_the_start(system, subspace, basis, step * steps)
    for number in range(1, steps + 1):
        velocity = system.velocity()
        if period is not None:
            if (number - 1) % period == 0 and number > 1:
                subspace, basis = _projector(system)
            _project(velocity, subspace, basis)
        with torch.no_grad():
            for name, p in system.parameters.items():
                p.add_(velocity[name], alpha=step)
        if number in wanted:
            times.append(number * step)
            values.append(0.5 * float((system.losses().double() - start).square().mean()))
    return Drift(times, values, overlap, predicted)


def checkpoints(steps: int, per_octave: int = 3) -> Iterator[int]:
    """Steps spaced evenly in the logarithm, the last one included."""
    count = int(per_octave * math.log2(steps))
    yield from sorted({round(steps / 2 ** (i / per_octave)) for i in range(count + 1)})


def _projector(system: System) -> tuple[Gradients, Eigenbasis]:
    gradients = system.gradients()
    return gradients, Eigenbasis.of(gradients.gram(), None, FLOOR)


def _project(velocity: dict[str, Tensor], subspace: Gradients, basis: Eigenbasis) -> None:
    subspace.subtract_(velocity, basis.tangent_weights(subspace.coefficients(velocity)))


def _at_the_start(
    system: System, subspace: Gradients, basis: Eigenbasis, time: float
) -> tuple[float, float]:
    """The task gradient's overlap with the subspace, and what the projected flow predicts."""
    velocity = system.velocity()
    length = math.sqrt(sum(float(v.double().square().sum()) for v in velocity.values()))
    overlap = basis.component_norm(subspace.coefficients(velocity)) / length
    _project(velocity, subspace, basis)
    slopes = subspace.coefficients(velocity)
    with torch.no_grad():
        bend = level_set_curvature(
            system.parameters, system.losses, velocity, slopes, scale=0.1 * time
        )
    return overlap, float(bend.square().mean()) / 8
