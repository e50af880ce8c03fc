"""What a guard does to one step of a base optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from safeopt.geometry.gradient_sketch import GradientSketch
from safeopt.geometry.moves import Retraction

if TYPE_CHECKING:
    from safeopt.guard import Guard

Momentum = Callable[[], Mapping[str, Tensor]]


class Correction(Protocol):
    """One step's correction: sees every displacement, then writes what remains to be written.

    A subspace that acts on each matrix alone corrects a parameter as soon as it has moved; one
    that spans all parameters has to see them all first.
    """

    def observe(self, name: str, parameter: Tensor, displacement: Tensor) -> None:
        """Take in that ``parameter`` has moved by ``displacement``; may write to it.

        Args:
            name: the parameter's name in the guard's model.
            parameter: its weights, already moved.
            displacement: what the base optimizer stored; overwritten after the call.
        """

    def finish(self, parameters: Mapping[str, Tensor]) -> dict[str, float]:
        """Write the rest of the correction and return the step's figures.

        Args:
            parameters: all that the optimizer holds, by name, also those that did not move.
        """


class StepGuard(Protocol):
    """What an optimizer asks of a guard during a step."""

    @property
    def model(self) -> nn.Module:
        """The model whose parameters move."""

    @property
    def brake(self) -> float:
        """Factor on the learning rate of this step, at most 1."""

    def refresh_if_due(self, names: frozenset[str]) -> None:
        """Refresh when the schedule says so; raises before anything has changed."""

    def correction(self, momentum: Momentum) -> Correction:
        """Begin the correction of one step.

        Args:
            momentum: gives the optimizer's first moments by name, once all have moved.
        """


class LevelSetCorrection:
    """Tangent and retraction: the weights lose G^T a, with a from c = G s over all parameters.

    Args:
        guard: keeps the eigenbasis, the violation and the schedule.
        sketch: the anchors' gradients G.
        momentum: gives the optimizer's first moments.
    """

    def __init__(self, guard: Guard, sketch: GradientSketch, momentum: Momentum) -> None:
        self._guard, self._sketch, self._momentum = guard, sketch, momentum
        self._coefficients = torch.zeros_like(guard.violation)
        self._squared_norm = 0.0
        self._seconds = 0.0

    def observe(self, name: str, parameter: Tensor, displacement: Tensor) -> None:
        """Add one parameter's displacement to c = G s and to ||s||^2."""
        del parameter
        start = time.perf_counter()
        self._coefficients += self._sketch.coefficients({name: displacement})
        self._squared_norm += squared_norm(displacement)
        self._seconds += time.perf_counter() - start

    def finish(self, parameters: Mapping[str, Tensor]) -> dict[str, float]:
        """Write tangent and retraction to the weights in one pass."""
        start = time.perf_counter()
        metrics = self._write(parameters)
        self._seconds += time.perf_counter() - start
        metrics["safety/step_ms"] = 1e3 * self._seconds
        self._guard.record_step(self._squared_norm**0.5, metrics)
        return metrics

    def _write(self, parameters: Mapping[str, Tensor]) -> dict[str, float]:
        guard, sketch, seen = self._guard, self._sketch, self._coefficients
        tangent = guard.tangent_weights(seen)
        removed = float(tangent @ seen)  # ||G^T a||^2, since G^T a projects s
        length, remaining = self._squared_norm**0.5, max(0.0, self._squared_norm - removed) ** 0.5
        needs_momentum = guard.momentum_orthogonal and guard.wants_retraction()
        momentum = self._momentum() if needs_momentum else {}
        along = sketch.coefficients(momentum)
        retraction = self._retraction(remaining, momentum, along)
        stored = self._subtract(parameters, tangent + retraction.weights, retraction, momentum)
        metrics = {
            "safety/removed_fraction": _ratio(removed**0.5, length),
            "safety/retraction_ratio": _ratio(retraction.norm, length),
        }
        if guard.basis_age == 0:
            metrics["safety/leak"] = _ratio(guard.leak_of(stored, retraction, along), remaining)
        return metrics

    def _retraction(
        self, step_norm: float, momentum: Mapping[str, Tensor], along: Tensor
    ) -> Retraction:
        if not self._guard.wants_retraction():
            return Retraction(torch.zeros_like(self._coefficients), 0.0, 0.0)
        norm = sum(float(m.norm()) ** 2 for m in momentum.values()) ** 0.5
        return self._guard.retraction_for(step_norm, along if momentum else None, norm)

    def _subtract(
        self,
        parameters: Mapping[str, Tensor],
        weights: Tensor,
        retraction: Retraction,
        momentum: Mapping[str, Tensor],
    ) -> Tensor:
        """Write -G^T a and the retraction's momentum; right after a refresh, return G d."""
        is_fresh = self._guard.basis_age == 0
        stored = self._coefficients.clone()
        for name, p in parameters.items():
            before = p.detach().clone() if is_fresh else None
            self._sketch.subtract_({name: p.detach()}, weights)
            if name in momentum and retraction.along:
                p.detach().add_(momentum[name].to(p), alpha=retraction.along)
            if before is not None:
                stored += self._sketch.coefficients({name: p.detach() - before})
        return stored


def squared_norm(tensor: Tensor) -> float:
    """||t||^2, summed in fp32 or better."""
    precision = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=precision)) ** 2


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
