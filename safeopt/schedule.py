"""When to refresh: after a fixed number of steps, or when second order predicts a violation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_GROWTH = 2.0  # a period without violation may be followed by one this much longer


class RefreshSchedule:
    """Says when a refresh is due.

    Tangent steps move the anchors to second order: after steps of summed length d the mean
    violation is about kappa d^2. Each refresh measures it, so kappa is known without an anchor
    pass of its own, and the adaptive schedule refreshes before the next step would take
    kappa d^2 above ``target``. Periods are long where curvature and steps are small, as after
    the learning rate has come down. The estimate of d at which the target is met is the
    geometric mean of the newest and the one before.

    Args:
        shortest: steps between two refreshes, at least.
        longest: steps between two refreshes, at most; None is the fixed schedule of ``shortest``.
        target: mean violation that is small enough, nats; used by the adaptive schedule.

    Attributes:
        shortest: as given.
        period: steps of the last period that ended.
        age: steps since the last refresh.
        refreshes: their number.

    Raises:
        ValueError: ``longest`` below ``shortest``, or an adaptive schedule without a target.
    """

    def __init__(self, shortest: int, longest: int | None, target: float) -> None:
        if longest is not None and longest < shortest:
            raise ValueError(
                f"refresh_within must be at least refresh_every, got {longest} < {shortest}"
            )
        if longest is not None and not target > 0:
            raise ValueError(
                f"refresh_within needs a budget above 0 to aim at, got {target}; raise budget or "
                "leave refresh_within out"
            )
        self.shortest, self._longest, self._target = shortest, longest, target
        self.period = shortest
        self.age = 0
        self.refreshes = 0
        self._path = 0.0
        self._last_step = 0.0
        self._reach = 0.0
        self._has_looked_again = False

    @property
    def may_look_again(self) -> bool:
        """True one step after a refresh, until a refresh has come so early once."""
        return self.age == 1 and not self._has_looked_again

    @property
    def is_due(self) -> bool:
        """True when a refresh has to come before the next step."""
        if self._longest is None or self.age < self.shortest:
            return self.age >= self.shortest
        return self.age >= self._longest or self._path + self._last_step > self._reach

    def advance(self, step_norm: float) -> None:
        """Count a step of length ||s||."""
        self.age += 1
        self._path += step_norm
        self._last_step = step_norm

    def refreshed(self, violation: float, *, is_new: bool = False) -> None:
        """Begin a period.

        Args:
            violation: mean violation that this refresh found, nats.
            is_new: the refresh was the first one of the parameters that train.
        """
        self.refreshes += 1
        self._has_looked_again = not is_new and (self._has_looked_again or self.age == 1)
        if self._path > 0 and self._longest is not None:
            self.period = self.age
            before = self._reach or self._path
            limit = _GROWTH * max(self._path, before)
            found = self._path * math.sqrt(self._target / violation) if violation > 0 else limit
            self._reach = math.sqrt(min(found, limit) * before)
        self.age, self._path = 0, 0.0

    def metrics(self) -> dict[str, float]:
        """``safety/basis_age`` in steps and ``safety/refreshes``."""
        age, refreshes = float(self.age), float(self.refreshes)
        return {"safety/basis_age": age, "safety/refreshes": refreshes}

    def state_dict(self) -> dict[str, Any]:
        """Position within the period and the estimate."""
        return {
            "period": self.period,
            "age": self.age,
            "refreshes": self.refreshes,
            "path": self._path,
            "last_step": self._last_step,
            "reach": self._reach,
            "has_looked_again": self._has_looked_again,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.period, self.age = state["period"], state["age"]
        self.refreshes, self._path = state["refreshes"], state["path"]
        self._last_step, self._reach = state["last_step"], state["reach"]
        self._has_looked_again = state.get("has_looked_again", False)
