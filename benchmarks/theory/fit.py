"""Log-log slopes and their confidence intervals over instances."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

# 97.5 % quantiles of Student's t by degrees of freedom, for the numbers of instances in use.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 19: 2.093}
_VANISHED = 1e-25  # a drift below this is rounding


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least-squares slope of log y over log x."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    x_mean, y_mean = fmean(x for x, _ in points), fmean(y for _, y in points)
    rise = sum((x - x_mean) * (y - y_mean) for x, y in points)
    return rise / sum((x - x_mean) ** 2 for x, _ in points)


def time_slope(run: Mapping[str, Any], *, until: float = 1.0) -> float | None:
    """Exponent of t in the drift, over a factor 8 of time that ends at ``until`` of the run.

    Under refresh the law holds from the end of the first period on: the fit starts four periods
    in. None where there is no drift.
    """
    times, values = run["times"], run["values"]
    if values[-1] < _VANISHED:
        return None
    last = times[-1] * until
    first = last / 8
    if run["period"] is not None and run["period"] * run["step"] < times[-1]:
        first = max(first, 4 * run["period"] * run["step"])
    kept = [
        (t, u) for t, u in zip(times, values, strict=True) if first * 0.999 <= t <= last * 1.001
    ]
    return slope([t for t, _ in kept], [u for _, u in kept])


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % confidence interval (Student's t) over independent instances."""
    mean, count = fmean(values), len(values)
    half = _STUDENT[count - 1] * stdev(values) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half, "instances": count}


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Slopes in t by case and period, slopes in p by case, and prediction over measurement."""
    found: dict[str, Any] = {}
    for case in dict.fromkeys(r["case"] for r in runs):
        own = [r for r in runs if r["case"] == case]
        found[case] = {
            "time": {
                label: _slopes([r for r in own if r["label"] == label])
                for label in dict.fromkeys(r["label"] for r in own)
            },
            "early": _slopes([r for r in own if r["label"] == "none"], until=1 / 8),
            "period": _period_slopes(own),
            "overlap": fmean(r["overlap"] for r in own),
            "frozen_predicted_over_measured": _prediction(own),
        }
    return found


def _slopes(runs: Sequence[Mapping[str, Any]], until: float = 1.0) -> dict[str, Any] | None:
    slopes = [time_slope(r, until=until) for r in runs]
    known = [s for s in slopes if s is not None]
    return interval(known) if len(known) == len(slopes) else None


def _period_slopes(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    refreshed = [r for r in runs if r["label"].startswith("p = ")]
    slopes = []
    for instance in dict.fromkeys(r["instance"] for r in refreshed):
        own = [r for r in refreshed if r["instance"] == instance]
        if own[-1]["values"][-1] < _VANISHED:
            return None
        slopes.append(slope([r["period"] for r in own], [r["values"][-1] for r in own]))
    return interval(slopes)


def _prediction(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How well t^4/8 mean Gamma_i^2, known at the start, gives the frozen projector's drift."""
    frozen = [r for r in runs if r["label"] == "frozen"]
    if any(r["values"][-1] < _VANISHED for r in frozen):
        return None
    middle = [len(r["times"]) // 2 for r in frozen]
    return interval(
        [
            r["predicted"] * r["times"][i] ** 4 / r["values"][i]
            for r, i in zip(frozen, middle, strict=True)
        ]
    )
