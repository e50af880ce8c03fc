"""How good predictors are: rank correlation, ROC and calibration, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from safeopt.diagnostics import Forecast, Pilot, PlannedRun, forecast
from safeopt.diagnostics.exchange import power_draws

Array = NDArray[np.float64]
Statistic = Callable[[Array, Array], float]

BREAKS = 0.1  # share of the refusals whose loss counts as broken
_DRAWS = 2000


def ranks(values: Array) -> Array:
    """Ranks from 0, the mean rank for ties."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: Array = (last - (counts + 1) / 2)[inverse]
    return means


def spearman(predicted: Array, actual: Array) -> float:
    """Spearman's rank correlation; nan if one side is constant."""
    a, b = ranks(predicted), ranks(actual)
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def roc_area(predicted: Array, actual: Array) -> float:
    """Chance that a run that breaks is ranked above one that does not; nan without both."""
    broken = actual > BREAKS
    positive, negative = int(broken.sum()), int((~broken).sum())
    if positive == 0 or negative == 0:
        return float("nan")
    above = ranks(predicted)[broken].sum() - positive * (positive - 1) / 2
    return float(above / (positive * negative))


def slope(predicted: Array, actual: Array) -> float:
    """Least-squares slope of actual on predicted: 1 if a forecast share means that share."""
    return float(np.polyfit(predicted, actual, 1)[0])


@dataclass(frozen=True)
class Score:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "one value"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def score(statistic: Statistic, predicted: Sequence[float], actual: Sequence[float]) -> Score:
    """A statistic with a percentile bootstrap over the runs."""
    x, y = np.asarray(predicted, float), np.asarray(actual, float)
    draw = np.random.default_rng(0)
    picks = draw.integers(len(x), size=(_DRAWS, len(x)))
    found = [statistic(x[pick], y[pick]) for pick in picks]
    known = [value for value in found if not math.isnan(value)] or [float("nan")]
    low, high = np.quantile(known, [0.025, 0.975])
    return Score(statistic(x, y), float(low), float(high))


Row = Mapping[str, Any]


def read_pilot(row: Row, written: Mapping[str, Any]) -> Pilot:
    """A pilot of a row of the results; losses and chances are means over its anchors."""
    kept = torch.tensor([[word == "1" for word in reading] for reading in written["kept"]])
    return Pilot(
        planned=PlannedRun(row["lr"], row["effective_steps"]),
        compression=written["compression"],
        effective_steps=torch.tensor(written["effective_steps"], dtype=torch.float64),
        losses=torch.tensor(written["anchor_loss"])[:, None],
        kept=kept,
        chances=torch.tensor(written["chance"])[:, None],
        margins=torch.tensor(written["margins"]),
        distances=torch.tensor(written["distances"], dtype=torch.float64),
        task_losses=torch.tensor(written["task_losses"]),
    )


def forecast_of(row: Row) -> Forecast:
    """The forecast that ``safeopt diagnose`` makes of the same pilots."""
    return forecast(_pilots(row))


def _pilots(row: Row) -> list[Pilot]:
    return [read_pilot(row, written) for written in row["pilots"]]


def by_forecast(row: Row) -> float:
    """The forecast share of lost anchors."""
    return float(forecast_of(row).lost[-1])


def _at_power(power: float) -> Callable[[Row], float]:
    """The share lost, read between the pilots at a power that is taken and not measured."""

    def predict(row: Row) -> float:
        pilots = _pilots(row)
        lost = [float((~pilot.kept[-1]).double().mean()) for pilot in pilots]
        rates = [math.log(pilot.compression) for pilot in pilots]
        wanted = pilots[0].planned.compression(len(pilots[0].task_losses), power)
        return float(np.interp(math.log(wanted), rates, lost))

    return predict


def _over_powers(row: Row) -> float:
    """The share lost that is expected over all powers that the pilots leave open."""
    drawn = power_draws(_pilots(row)).tolist()
    return float(np.mean([_at_power(power)(row) for power in drawn[:: len(drawn) // 100]]))


def _by_mean(row: Row) -> float:
    return float(np.mean([float((~pilot.kept[-1]).double().mean()) for pilot in _pilots(row)]))


def _by_chance(row: Row) -> float:
    return 1 - float(np.mean([p["chance"][-1] / p["chance"][0] for p in row["pilots"]]))


def _by_loss(row: Row) -> float:
    return float(forecast_of(row).anchor_loss[-1])


def _with_tie_breaks(row: Row) -> float:
    made = forecast_of(row)
    return float(made.lost[-1]) + 1e-6 * float(made.high[-1])


PREDICTORS: Mapping[str, Callable[[Row], float]] = {
    "**forecast**: anchors lost at the measured power": by_forecast,
    "... ties by the interval's upper end": _with_tie_breaks,
    "anchors lost, expected over the powers left open": _over_powers,
    **{f"anchors lost at power {power}": _at_power(power) for power in (0, 0.25, 0.5, 0.75, 1)},
    "anchors lost, mean of the pilots": _by_mean,
    "probability of the openings, mean of the pilots": _by_chance,
    "anchor loss at the measured power": _by_loss,
    "learning rate x steps": lambda row: float(row["cheap"]["accumulated_rate"]),
    "... x gradient norm": lambda row: float(row["cheap"]["gradient_norm"]),
    "... x cosine with the anchors": lambda row: float(row["cheap"]["gradient_cosine"]),
    "loss after 10 steps": lambda row: float(row["cheap"]["short_pilot"]),
    "(the run itself: anchors it lost)": lambda row: float(row["actual"]["anchors_lost"]),
}
