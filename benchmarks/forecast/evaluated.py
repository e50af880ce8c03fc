"""What predictors were worth here, as `safeopt.diagnostics.evaluated` reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safeopt.diagnostics
from benchmarks.forecast import smols, worlds
from benchmarks.forecast.score import BREAKS, Row, by_forecast, score, spearman
from safeopt.diagnostics.cheap import NAMES
from safeopt.diagnostics.evaluated import FORECAST
from safeopt.files import write_json

PACKAGED = Path(safeopt.diagnostics.__file__).parent / "evaluated.json"


def write_evaluated(
    world: Sequence[Row], smol: Sequence[Row], path: Path = PACKAGED
) -> dict[str, Any]:
    """Write the file of the package."""
    suites = [
        suite("the synthetic world", worlds.PARAMETERS, world),
        suite("SmolLM2-135M", smols.PARAMETERS, smol),
    ]
    found = {"command": "python -m benchmarks.forecast.table", "suites": suites}
    write_json(path, found)
    return found


def suite(name: str, parameters: int, rows: Sequence[Row]) -> dict[str, Any]:
    """One suite's part of the file."""
    steps = [row["effective_steps"] for row in rows]
    predictors: Mapping[str, Callable[[Row], float]] = {
        FORECAST: by_forecast,
        **{key: partial(_cheap, key) for key in NAMES},
    }
    return {
        "name": name,
        "parameters": parameters,
        "runs": len(rows),
        "steps": [round(min(steps), 1), round(max(steps), 1)],
        "worth": {key: worth(predict, rows) for key, predict in predictors.items()},
    }


def _cheap(key: str, row: Row) -> float:
    return float(row["cheap"][key])


def worth(predict: Callable[[Row], float], rows: Sequence[Row]) -> dict[str, Any]:
    """A predictor's rank correlation, and the values beyond which all runs went one way."""
    values, lost = [predict(row) for row in rows], [row["actual"]["lost"] for row in rows]
    ranked = score(spearman, values, lost)
    broke = [value for value, share in zip(values, lost, strict=True) if share > BREAKS]
    held = [value for value, share in zip(values, lost, strict=True) if share <= BREAKS]
    below = [value for value in held if value < min(broke, default=float("inf"))]
    above = [value for value in broke if value > max(held, default=-float("inf"))]
    return {
        "rank": [round(end, 3) for end in (ranked.value, ranked.low, ranked.high)],
        "holds": _rounded(max(below, default=None)),
        "breaks": _rounded(min(above, default=None)),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
