from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeopt.evaluation import Rate
from safeopt.intervals import Z_95


@st.composite
def rates(draw: st.DrawFn) -> Rate:
    total = draw(st.integers(1, 5000))
    return Rate(draw(st.integers(0, total)), total)


@settings(deadline=None)
@given(rates())
def test_ends_solve_the_score_equation(rate: Rate) -> None:
    for end in rate.interval():
        distance = Z_95 * math.sqrt(end * (1 - end) / rate.total)
        assert abs(rate.value - end) == pytest.approx(distance, abs=1e-7)


@settings(deadline=None)
@given(rates())
def test_holds_the_rate_and_mirrors(rate: Rate) -> None:
    low, high = rate.interval()
    assert 0 <= low <= rate.value + 1e-12
    assert rate.value - 1e-12 <= high <= 1
    mirrored = Rate(rate.total - rate.count, rate.total).interval()
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_published_value() -> None:
    # Newcombe 1998, table I: 81 of 263, Wilson without continuity correction.
    assert Rate(81, 263).interval() == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize(("count", "total"), [(0, 0), (-1, 4), (5, 4)])
def test_impossible_counts_are_refused(count: int, total: int) -> None:
    with pytest.raises(ValueError, match="0 <= count <= total"):
        Rate(count, total)
