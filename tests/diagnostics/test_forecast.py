from __future__ import annotations

import pytest
import torch
from torch import Tensor

from safeopt.diagnostics import Pilot, PlannedRun, Verdict, forecast


def pilot(kept: Tensor, steps: float = 128.0, task: list[float] | None = None) -> Pilot:
    readings, anchors = kept.shape
    planned = PlannedRun(1e-4, steps)
    return Pilot(
        planned=planned,
        compression=planned.compression(32),
        effective_steps=torch.linspace(0, steps, readings, dtype=torch.float64),
        losses=torch.rand(readings, anchors),
        kept=kept,
        chances=kept.float(),
        task_losses=torch.tensor(task or [3.0, 2.0, 1.5, 1.0]),
    )


def ends_with(lost: int, anchors: int = 64) -> Tensor:
    kept = torch.ones(3, anchors, dtype=torch.bool)
    kept[1, : lost // 2] = False
    kept[2, :lost] = False
    return kept


def test_share_and_interval_are_those_of_the_mean() -> None:
    made = forecast([pilot(ends_with(16)), pilot(ends_with(24))], resamples=4000)
    assert made.lost.tolist() == pytest.approx([0, 10 / 64, 20 / 64])
    assert float(made.low[-1]) < 20 / 64 < float(made.high[-1])
    # At least the binomial spread of the anchors, plus that between the pilots.
    sigma = (20 / 64 * 44 / 64 / 64) ** 0.5
    assert float(made.high[-1] - made.low[-1]) > 2 * 1.96 * sigma * 0.9
    assert made.first_step_over() == 64.0


@pytest.mark.parametrize(
    ("lost", "verdict", "code"),
    [(0, Verdict.GO, 0), (7, Verdict.CAUTION, 0), (40, Verdict.NO_GO, 3)],
)
def test_verdicts(lost: int, verdict: Verdict, code: int) -> None:
    made = forecast([pilot(ends_with(lost))])
    assert (made.verdict, made.verdict.exit_code) == (verdict, code)
    assert "10 % may be" in made.reason


def test_inconclusive_beyond_the_window_and_when_the_task_diverges() -> None:
    far = forecast([pilot(ends_with(0), steps=32 * 8.1**2)])
    assert far.verdict is Verdict.INCONCLUSIVE
    assert "more steps" in far.reason
    wild = forecast([pilot(ends_with(0), task=[2.0, 3.0, 5.0, 9.0])])
    assert wild.verdict is Verdict.INCONCLUSIVE
    assert wild.verdict.exit_code == 4
    nan = forecast([pilot(ends_with(0), task=[2.0, 3.0, 5.0, float("nan")])])
    assert nan.verdict is Verdict.INCONCLUSIVE


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="at least one pilot"):
        forecast([])
    with pytest.raises(ValueError, match="different planned runs"):
        forecast([pilot(ends_with(0)), pilot(ends_with(0), steps=99)])
    with pytest.raises(ValueError, match="its own replies"):
        forecast([pilot(torch.zeros(3, 5, dtype=torch.bool))])
