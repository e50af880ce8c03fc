from __future__ import annotations

import numpy as np
import pytest

from benchmarks.forecast.planned import Cell
from benchmarks.forecast.score import (
    PREDICTORS,
    by_forecast,
    forecast_of,
    ranks,
    roc_area,
    score,
    slope,
    spearman,
)
from benchmarks.forecast.worlds import RESULTS, Worlds
from safeopt.files import read_jsonl


def test_ranks_share_ties() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 7.0])).tolist() == [1.5, 0.0, 1.5, 3.0]


def test_rank_correlation_asks_for_order_alone() -> None:
    x = np.random.default_rng(0).normal(size=50)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)
    y = np.random.default_rng(1).normal(size=50)
    a, b = ranks(x), ranks(y)
    known = 1 - 6 * ((a - b) ** 2).sum() / (50 * (50**2 - 1))
    assert spearman(x, y) == pytest.approx(known)


def test_roc_area_counts_pairs() -> None:
    predicted, actual = np.array([0.1, 0.4, 0.4, 0.9]), np.array([0.0, 0.5, 0.0, 1.0])
    # Four pairs of a broken and a whole run: three in order, one tied.
    assert roc_area(predicted, actual) == pytest.approx(3.5 / 4)
    assert np.isnan(roc_area(predicted, np.zeros(4)))


def test_slope_and_interval() -> None:
    x = np.linspace(0, 1, 40)
    y = 0.5 * x + 0.01 * np.random.default_rng(2).normal(size=40)
    found = score(slope, x.tolist(), y.tolist())
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.05


def test_results_hold_each_run_once_and_score() -> None:
    rows = [row for _, row in read_jsonl(RESULTS)]
    found = [Cell(**{k: row[k] for k in Cell.__dataclass_fields__}) for row in rows]
    assert len(rows) >= 60
    assert sorted(map(str, found)) == sorted(map(str, Worlds().cells()))
    for row in rows[::10]:
        made = forecast_of(row)
        assert made.low[-1] <= made.lost[-1] <= made.high[-1]
        assert by_forecast(row) == float(made.lost[-1])
        assert all(np.isfinite(predict(row)) for predict in PREDICTORS.values())
