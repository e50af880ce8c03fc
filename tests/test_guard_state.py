"""A guard's saved state, and guards that it does not fit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

import safeopt
from tests.zoo import assert_equal_nested, llama, random_anchors

OWN = random_anchors(4)


def refreshed_state(anchors: safeopt.Anchors, **options: Any) -> dict[str, Any]:
    guard = safeopt.Guard(llama(), anchors, **options)
    guard.refresh()
    return guard.state_dict()


def without(state: dict[str, Any], part: str, *keys: str) -> dict[str, Any]:
    return {**state, part: {k: v for k, v in state[part].items() if k not in keys}}


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        (lambda: refreshed_state(random_anchors(5)), "made with 5 anchors, the guard has 4"),
        (lambda: refreshed_state(random_anchors(4)), "4 anchors, the guard has others; build it"),
        (lambda: refreshed_state(OWN, reference="kl"), 'build it with reference="kl"'),
        (lambda: {"passport": "abc"}, r"Guard\.from_passport"),
        (lambda: without(refreshed_state(OWN), "sampler", "queues"), r"lacks sampler\.queues;"),
        (lambda: {"calibration": refreshed_state(OWN)["calibration"]}, "lacks schedule, "),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    state: Callable[[], dict[str, Any]], complaint: str
) -> None:
    guard = safeopt.Guard(llama(), OWN)
    before = guard.state_dict()
    with pytest.raises(ValueError, match=complaint):
        guard.load_state_dict(state())
    assert_equal_nested(before, guard.state_dict())


def test_a_state_of_nll_is_none_of_kl() -> None:
    with pytest.raises(ValueError, match='build it with reference="nll"'):
        safeopt.Guard(llama(), OWN, reference="kl").load_state_dict(refreshed_state(OWN))


@pytest.mark.parametrize("reference", ["nll", "kl"])
def test_states_without_a_digest_still_load(reference: Any) -> None:
    state = refreshed_state(random_anchors(4), reference=reference)
    new = {"calibration": ("anchors", "reference"), "schedule": ("has_looked_again",)}

    def without_new(state: Any) -> Any:
        return functools.reduce(lambda s, part: without(s, part, *new[part]), new, state)

    old = without_new(state)
    guard = safeopt.Guard(llama(), OWN, reference=reference)
    guard.load_state_dict(old)
    assert_equal_nested(old, without_new(guard.state_dict()))
    other = safeopt.Guard(llama(), OWN, reference="kl" if reference == "nll" else "nll")
    with pytest.raises(ValueError, match=f'build it with reference="{reference}"'):
        other.load_state_dict(old)
