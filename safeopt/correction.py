"""What a guard does to one step of a base optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from safeopt.geometry.moves import Retraction
from safeopt.geometry.sharding import Coordinates

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
        blank: gives empty `Coordinates` over the guard's frame.
        momentum: gives the optimizer's first moments.
    """

    def __init__(self, guard: Guard, blank: Callable[[], Coordinates], momentum: Momentum) -> None:
        self._guard, self._blank, self._momentum = guard, blank, momentum
        self._step = blank()
        self._seconds = 0.0

    def observe(self, name: str, parameter: Tensor, displacement: Tensor) -> None:
        """Add one parameter's displacement to c = G s and to ||s||^2."""
        del parameter
        start = time.perf_counter()
        self._step.add(name, displacement)
        self._seconds += time.perf_counter() - start

    def finish(self, parameters: Mapping[str, Tensor]) -> dict[str, float]:
        """Write tangent and retraction to the weights in one pass."""
        start = time.perf_counter()
        self._step.sum_shards()
        metrics = self._write(parameters)
        self._seconds += time.perf_counter() - start
        metrics["safety/step_ms"] = 1e3 * self._seconds
        self._guard.record_step(self._step.norm, metrics)
        return metrics

    def _write(self, parameters: Mapping[str, Tensor]) -> dict[str, float]:
        guard, seen, length = self._guard, self._step.coefficients, self._step.norm
        tangent = guard.tangent_weights(seen)
        removed = float(tangent @ seen)  # ||G^T a||^2, since G^T a projects s
        remaining = max(0.0, self._step.squared_norm - removed) ** 0.5
        momentum: Mapping[str, Tensor] = {}
        along = self._blank()
        if guard.wants_momentum():  # alike on all processes, as a sum over shards must be
            momentum = self._momentum()
            for name, m in momentum.items():
                along.add(name, m)
            along.sum_shards()
        retraction = guard.retraction_for(remaining, along.coefficients, along.norm)
        stored = self._subtract(parameters, tangent + retraction.weights, retraction, momentum)
        metrics = {
            "safety/removed_fraction": _ratio(removed**0.5, length),
            "safety/retraction_ratio": _ratio(retraction.norm, length),
        }
        if stored is not None:
            leak = guard.leak_of(stored, retraction, along.coefficients)
            metrics["safety/leak"] = _ratio(leak, remaining)
        return metrics

    def _subtract(
        self,
        parameters: Mapping[str, Tensor],
        weights: Tensor,
        retraction: Retraction,
        momentum: Mapping[str, Tensor],
    ) -> Tensor | None:
        """Write -G^T a and the retraction's momentum; right after a refresh, return G d."""
        is_fresh = self._guard.basis_age == 0
        change = self._blank()
        for name, p in parameters.items():
            before = p.detach().clone() if is_fresh else None
            self._guard.frame.sketch.subtract_({name: p.detach()}, weights)
            if name in momentum and retraction.along:
                p.detach().add_(momentum[name].to(p), alpha=retraction.along)
            if before is not None:
                change.add(name, parameters[name].detach() - before)  # as stored
        if not is_fresh:
            return None
        change.sum_shards()
        return self._step.coefficients + change.coefficients


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
