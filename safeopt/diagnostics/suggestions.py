"""What would help a planned run, with the effect that pilots predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from safeopt.diagnostics.forecast import Forecast
from safeopt.diagnostics.pilot import Pilot, PlannedRun
from safeopt.intervals import Rate


@dataclass(frozen=True)
class GuardedPilot:
    """A pilot under a guard.

    Attributes:
        pilot: what it saw of anchors that the guard was not given.
        optimizer: the optimizer's name.
        budget: the guard's budget, nats.
    """

    pilot: Pilot
    optimizer: str
    budget: float

    def lost(self) -> Rate:
        """Anchors lost at the pilot's end, of those kept at its start."""
        held = self.pilot.kept[0]
        return Rate(int((~self.pilot.kept[-1, held]).sum()), int(held.sum()))


def suggestions(
    forecast: Forecast,
    planned: PlannedRun,
    guarded: GuardedPilot | None = None,
    row_scores: Sequence[float] = (),
) -> list[str]:
    """What would help; nothing where the run is safe as it is."""
    if float(forecast.high[-1]) <= forecast.tolerance:
        return []
    advice = [_slower(forecast, planned)]
    if guarded is not None:
        advice.append(_under_a_guard(guarded))
    worst = max(range(len(row_scores)), key=row_scores.__getitem__, default=0)
    if row_scores and row_scores[worst] > 0:
        advice.append(
            f"Look at row {worst + 1} of the {len(row_scores)} that were scored: two planned steps "
            f"on it alone raise the mean anchor loss by {row_scores[worst]:.2g} nats, the most of "
            f"them."
        )
    return advice


def _slower(forecast: Forecast, planned: PlannedRun) -> str:
    """A reading at S_r of S steps stands for the whole run at the rate eta (S_r / S)^power."""
    held = torch.nonzero(forecast.high <= forecast.tolerance).flatten()
    held = held[forecast.effective_steps[held] > 0]
    if not len(held):
        return "No reading of the pilots is known to be safe: lower the rate, or give more anchors."
    reading = int(held[-1])
    share = float(forecast.effective_steps[reading] / forecast.effective_steps[-1])
    rate = share**forecast.power.value * planned.learning_rate
    expected, most = 100 * float(forecast.lost[reading]), 100 * float(forecast.high[reading])
    return (
        f"Lower the learning rate to {rate:.2g}: {expected:.0f} % of the anchors are then expected "
        f"to be lost, {most:.0f} % at most."
    )


def _under_a_guard(guarded: GuardedPilot) -> str:
    lost, steps = guarded.lost(), len(guarded.pilot.task_losses)
    low, high = (100 * end for end in lost.interval())
    return (
        f"Train with {guarded.optimizer} and a guard with a budget of {guarded.budget:g} nats: a "
        f"pilot of {steps} such steps lost {100 * lost.value:.0f} % ({low:.0f} to {high:.0f} %) of "
        f"{lost.total} anchors that its guard was not given."
    )
