"""What a guard does to one step of a base optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from safeopt.geometry.blocks import Block
from safeopt.geometry.sharding import Coordinates

if TYPE_CHECKING:
    from safeopt.guard import Guard

Momentum = Callable[[], Mapping[str, Tensor]]
# Writes p <- p - G^T a + along m for weights a and moments m, and shows what it has stored.
Write = Callable[[Tensor, Mapping[str, Tensor], float, "Coordinates | None"], None]


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
        """Refresh when the guard says so; raises before anything has changed.

        Args:
            names: trainable parameters that the optimizer moves.
        """

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

    @property
    def losses(self) -> Tensor:
        """The anchor losses at the last refresh, (N,)."""
        return self._guard.frame.sketch.losses

    def blocks(self, name: str) -> tuple[Block, ...]:
        """The anchors' gradients of one parameter."""
        return self._guard.frame.sketch.blocks.get(name, ())

    def counts(self, name: str) -> bool:
        """True if this process's part of a parameter enters c = G s and ||s||^2."""
        return self._step.counts(name)

    def take(self, coefficients: Tensor, squared_norm: float) -> None:
        """Take in c = G s and ||s||^2 of some parameters that count."""
        self._step.take(coefficients, squared_norm)

    def spent(self, seconds: float) -> None:
        """Count time that the step has taken elsewhere, for ``safety/step_ms``."""
        self._seconds += seconds

    def observe(self, name: str, parameter: Tensor, displacement: Tensor) -> None:
        """Add one parameter's displacement to c = G s and to ||s||^2."""
        del parameter
        start = time.perf_counter()
        self._step.add(name, displacement)
        self._seconds += time.perf_counter() - start

    def finish(
        self, parameters: Mapping[str, Tensor], write: Write | None = None
    ) -> dict[str, float]:
        """Write tangent and retraction to the weights in one pass, by ``write`` if there is one."""
        start = time.perf_counter()
        self._step.sum_shards()
        metrics = self._write(write or partial(self._write_each, parameters))
        self._seconds += time.perf_counter() - start
        metrics["safety/step_ms"] = 1e3 * self._seconds
        self._guard.record_step(self._step.norm, metrics)
        return metrics

    def _write(self, write: Write) -> dict[str, float]:
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
        is_fresh = guard.basis_age == 0  # then look at what is really stored
        change = self._blank()
        write(
            tangent + retraction.weights, momentum, retraction.along, change if is_fresh else None
        )
        metrics = {
            "safety/removed_fraction": _ratio(removed**0.5, length),
            "safety/retraction_ratio": _ratio(retraction.norm, length),
        }
        if is_fresh:
            change.sum_shards()
            stored = self._step.coefficients + change.coefficients
            leak = guard.frame.leak_of(stored, retraction, along.coefficients)
            metrics["safety/leak"] = _ratio(leak, remaining)
        return metrics

    def _write_each(
        self,
        parameters: Mapping[str, Tensor],
        weights: Tensor,
        momentum: Mapping[str, Tensor],
        along: float,
        change: Coordinates | None,
    ) -> None:
        """Write -G^T a and the retraction's momentum, one parameter after another."""
        for name, p in parameters.items():
            before = p.detach() if change is None else p.detach().clone()
            self._guard.frame.sketch.subtract_({name: p.detach()}, weights)
            if name in momentum and along:
                p.detach().add_(momentum[name].to(p), alpha=along)
            if change is not None:
                change.add(name, parameters[name].detach() - before)  # as stored


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
