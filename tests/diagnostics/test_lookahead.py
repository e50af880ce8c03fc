from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.theory.toy import Toy
from safeopt.diagnostics import Estimate, Law, Verdict, look_ahead, mean_law

RATE = 1e-4


def sgd(toy: Toy, rate: float) -> Callable[[], None]:
    def step() -> None:
        toy.x.add_(toy.velocity()["x"], alpha=rate)

    return step


def simulated(toy: Toy, steps: int) -> float:
    """1/2 mean (l_i(t) - l_i(0))^2 after real steps."""
    before, step = toy.losses(), sgd(toy, RATE)
    for _ in range(steps):
        step()
    drift = float(0.5 * (toy.losses() - before).square().mean())
    toy.x.zero_()
    return drift


def measured(toy: Toy, stride: float = 20.0) -> Law:
    return look_ahead(toy.parameters, toy.losses, [sgd(toy, stride * RATE)], stride=stride)[0]


@pytest.mark.parametrize("curved", [False, True], ids=["flat level set", "curved level set"])
@pytest.mark.parametrize("overlap", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_forecast_is_right_inside_its_window(seed: int, overlap: float, curved: bool) -> None:
    toy = Toy(seed, overlap=overlap, curved=curved)
    law = measured(toy)
    # Known constants: v = -eta A g - eta^2/2 A H g, Gamma = eta^2 (g^T Q_i g + A H g).
    turn = RATE**2 * toy.normals @ toy.hessian @ toy.slope
    velocity = -RATE * toy.normals @ toy.slope - 0.5 * turn
    acceleration = RATE**2 * (toy.bends @ toy.slope) @ toy.slope + turn
    known = Law(velocity, acceleration, torch.zeros_like(velocity))
    window = law.window()
    assert window > 100
    for share in (0.5, 1.0):
        steps = round(share * window)
        actual = simulated(toy, steps)
        assert law.drift(steps) == pytest.approx(actual, rel=0.1)
        assert known.drift(steps) == pytest.approx(actual, rel=0.15)


def test_outside_its_window_nothing_is_said() -> None:
    toy = Toy(0)
    law = measured(toy)
    window = law.window()
    assert law.judge(0.9 * window, 2 * law.drift(window)) is Verdict.GO
    assert law.judge(0.9 * window, 1e-3 * law.drift(window)) is Verdict.NO_GO
    assert law.judge(0.9 * window, law.drift(0.9 * window)) is Verdict.CAUTION
    far = round(6 * window)
    assert law.judge(far, 1e9) is Verdict.INCONCLUSIVE
    assert law.drift(far) != pytest.approx(simulated(toy, far), rel=0.1)


def test_onset_is_quartic_without_overlap_and_quadratic_with_it() -> None:
    flat = Law(torch.zeros(3), torch.rand(3), torch.zeros(3))
    sloped = Law(torch.rand(3), torch.zeros(3), torch.zeros(3))
    assert flat.drift(20) / flat.drift(10) == pytest.approx(16)
    assert sloped.drift(20) / sloped.drift(10) == pytest.approx(4)


def test_weights_come_back_and_paths_are_their_own() -> None:
    toy = Toy(1)
    laws = look_ahead(toy.parameters, toy.losses, [sgd(toy, 1e-3), sgd(toy, 2e-3)])
    assert torch.equal(toy.x, torch.zeros_like(toy.x))
    ratio: Tensor = laws[1].acceleration / laws[0].acceleration
    torch.testing.assert_close(ratio, torch.full_like(ratio, 4.0), rtol=0.05, atol=0)
    assert torch.equal(mean_law(laws).velocity, (laws[0].velocity + laws[1].velocity) / 2)


def test_interval_holds_its_mean() -> None:
    samples = torch.randn(40, generator=torch.Generator().manual_seed(1)).tolist()
    found = Estimate.of(samples)
    assert found.low < found.value < found.high
    half = 1.96 * torch.tensor(samples).std().item() / 40**0.5
    assert found.high - found.low == pytest.approx(2 * half, rel=0.2)
    assert Estimate.of([3.0]) == Estimate(3.0, 3.0, 3.0)
