"""How good predictors are: rank correlation, ROC and calibration, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def by_forecast(row: Mapping[str, Any]) -> float:
    """The forecast share of lost anchors; the forecast loss decides between equals."""
    predicted = row["predicted"]
    return float(predicted["lost"]) + 1e-6 * float(predicted["anchor_loss"])


PREDICTORS: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "**forecast** (compressed pilots)": by_forecast,
    "anchor loss at the pilots' end": lambda row: float(row["predicted"]["anchor_loss"]),
    "learning rate x steps": lambda row: float(row["predicted"]["accumulated_rate"]),
    "... x gradient norm": lambda row: float(row["predicted"]["gradient_norm"]),
    "... x cosine with the anchors": lambda row: float(row["predicted"]["gradient_cosine"]),
    "loss after 10 steps": lambda row: float(row["predicted"]["short_pilot"]),
}
