"""How good predictors are: rank correlation, ROC and calibration, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from safeopt.diagnostics import Forecast, Pilot, PlannedRun, forecast

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
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def score(statistic: Statistic, predicted: Sequence[float], actual: Sequence[float]) -> Score:
    """A statistic with a percentile bootstrap over the runs."""
    x, y = np.asarray(predicted, float), np.asarray(actual, float)
    draw = np.random.default_rng(0)
    picks = draw.integers(len(x), size=(_DRAWS, len(x)))
    found = [statistic(x[pick], y[pick]) for pick in picks]
    low, high = np.nanquantile(found, [0.025, 0.975])
    return Score(statistic(x, y), float(low), float(high))


Row = Mapping[str, Any]


def read_pilot(row: Row, written: Mapping[str, Any]) -> Pilot:
    """A pilot of a row of the results; losses and chances are means over its anchors.

    Older results have neither margins nor distances.
    """
    kept = torch.tensor([[word == "1" for word in reading] for reading in written["kept"]])
    unknown = torch.full(kept.shape, torch.nan)
    return Pilot(
        planned=PlannedRun(row["lr"], row["effective_steps"]),
        compression=written["compression"],
        effective_steps=torch.tensor(written["effective_steps"], dtype=torch.float64),
        losses=torch.tensor(written["anchor_loss"])[:, None],
        kept=kept,
        chances=torch.tensor(written["chance"])[:, None],
        margins=torch.tensor(written["margins"]) if "margins" in written else unknown,
        distances=torch.as_tensor(written.get("distances", unknown[:, 0])),
        task_losses=torch.tensor(written["task_losses"]),
    )


def forecast_of(row: Row, powers: Sequence[float] = (0.3, 0.5, 0.7)) -> Forecast:
    """The forecast that ``safeopt diagnose`` makes of the same pilots."""
    return forecast([read_pilot(row, p) for p in row["pilots"] if p["power"] in powers])


def by_forecast(row: Row) -> float:
    """The forecast share of lost anchors; the forecast loss decides between equals."""
    made = forecast_of(row)
    return float(made.lost[-1]) + 1e-6 * float(made.anchor_loss[-1])


def _by(read: Callable[[Forecast], float], *powers: float) -> Callable[[Row], float]:
    return lambda row: read(forecast_of(row, powers))


def _chance(row: Row) -> float:
    return 1 - float(np.mean([p["chance"][-1] / p["chance"][0] for p in row["pilots"]]))


def _loss(made: Forecast) -> float:
    return float(made.anchor_loss[-1])


def _lost(made: Forecast) -> float:
    return float(made.lost[-1]) + 1e-6 * _loss(made)


def _with_upper_end(made: Forecast) -> float:
    return float(made.lost[-1]) + 1e-6 * float(made.high[-1])


PREDICTORS: Mapping[str, Callable[[Row], float]] = {
    "**forecast**: anchors lost, mean of three pilots": by_forecast,
    "anchors lost, ties by the interval's upper end": lambda row: _with_upper_end(forecast_of(row)),
    "anchors lost, power 0.3 alone": _by(_lost, 0.3),
    "anchors lost, power 0.5 alone": _by(_lost, 0.5),
    "anchors lost, power 0.7 alone": _by(_lost, 0.7),
    "probability of the openings, three pilots": _chance,
    "anchor loss, three pilots": _by(_loss, 0.3, 0.5, 0.7),
    "learning rate x steps": lambda row: float(row["cheap"]["accumulated_rate"]),
    "... x gradient norm": lambda row: float(row["cheap"]["gradient_norm"]),
    "... x cosine with the anchors": lambda row: float(row["cheap"]["gradient_cosine"]),
    "loss after 10 steps": lambda row: float(row["cheap"]["short_pilot"]),
    "(the run itself: anchors it lost)": lambda row: float(row["actual"]["anchors_lost"]),
}
