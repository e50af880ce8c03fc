from __future__ import annotations

import copy
import math
import random

import pytest
import torch

import safeopt
from safeopt.schedule import RefreshSchedule
from tests.zoo import llama, random_anchors, take_training_step, trainable


def run(
    schedule: RefreshSchedule, lengths: list[float], curvature: float
) -> tuple[list[int], list[float]]:
    """Ages and violations at each refresh, with anchors that drift by curvature * path^2."""
    path, ages, found = 0.0, [0], [0.0]
    schedule.refreshed(0.0)
    for length in lengths:
        if schedule.is_due:
            ages.append(schedule.age)
            found.append(curvature * path**2)
            schedule.refreshed(found[-1])
            path = 0.0
        path += length
        schedule.advance(length)
    assert schedule.refreshes >= len(ages)
    return ages, found


def test_fixed_schedule_counts_steps_alone() -> None:
    schedule = RefreshSchedule(5, None, 0.0)
    ages, _ = run(schedule, [random.random() for _ in range(41)], curvature=100.0)
    assert ages == [0, *[5] * 8]
    assert schedule.period == 5


@pytest.mark.parametrize("curvature", [0.5, 5.0, 50.0])
def test_adaptive_schedule_settles_just_below_its_target(curvature: float) -> None:
    """Constant steps and curvature: kappa d^2 ends within one step of the target, from below."""
    length, target = 0.01, 0.02
    _, found = run(RefreshSchedule(1, 1000, target), [length] * 4000, curvature)
    reach = math.sqrt(target / curvature)
    for violation in found[-5:]:
        path = math.sqrt(violation / curvature)
        assert reach - 1.5 * length <= path <= reach + 1e-6


def test_periods_grow_as_steps_shrink_and_stay_within_their_limits() -> None:
    ages, _ = run(RefreshSchedule(5, 40, 0.02), [0.1 * 0.99**i for i in range(900)], 1.0)
    assert min(ages[1:]) == 5
    assert max(ages) == 40
    assert ages[1:] == sorted(ages[1:])


def test_resumed_schedule_goes_on_alike() -> None:
    lengths = [random.uniform(0.01, 0.1) for _ in range(200)]
    one = RefreshSchedule(2, 40, 0.02)
    run(one, lengths[:100], 1.0)
    other = RefreshSchedule(2, 40, 0.02)
    other.load_state_dict(one.state_dict())
    assert run(one, lengths[100:], 1.0) == run(other, lengths[100:], 1.0)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="refresh_within must be at least refresh_every"):
        RefreshSchedule(5, 3, 0.02)
    with pytest.raises(ValueError, match="budget above 0"):
        RefreshSchedule(5, 10, 0.0)


def test_a_guard_refreshes_less_often_once_steps_are_short() -> None:
    model = llama()
    guard = safeopt.Guard(
        model, random_anchors(4), anchors_per_refresh=4, refresh_every=2, refresh_within=16
    )
    optimizer = safeopt.SafeAdamW(model.parameters(), lr=1e-3, guard=guard)
    batch, counts = torch.randint(0, 97, (4, 10)), []
    for lr in (1e-3, 1e-5):
        optimizer.param_groups[0]["lr"] = lr
        before = guard.metrics().get("safety/refreshes", 0.0)
        for _ in range(32):
            take_training_step(model, optimizer, batch)
            assert guard.basis_age <= 16
        counts.append(guard.metrics()["safety/refreshes"] - before)
    assert counts[1] < counts[0] <= 16


def test_a_guard_resumes_its_schedule_bit_for_bit() -> None:
    anchors, batch = random_anchors(4), torch.randint(0, 97, (4, 10))
    torch.manual_seed(0)
    model = llama()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = {"anchors_per_refresh": 2, "refresh_every": 1, "refresh_within": 9}

    def build() -> tuple[safeopt.Guard, safeopt.SafeAdamW]:
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(start[n])
        guard = safeopt.Guard(model, anchors, **settings)
        return guard, safeopt.SafeAdamW(model.parameters(), lr=1e-3, guard=guard)

    guard, optimizer = build()
    for _ in range(10):
        take_training_step(model, optimizer, batch)
    kept = guard.state_dict(), optimizer.state_dict()
    middle = {n: p.detach().clone() for n, p in trainable(model).items()}
    kept = copy.deepcopy(kept)
    for _ in range(10):
        take_training_step(model, optimizer, batch)
    final = {n: p.detach().clone() for n, p in trainable(model).items()}
    guard, optimizer = build()
    guard.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(middle[n])
    for _ in range(10):
        take_training_step(model, optimizer, batch)
    assert all(torch.equal(p, final[n]) for n, p in trainable(model).items())
