from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from safeopt.diagnostics import Pilot, PlannedRun, Verdict, forecast
from safeopt.evaluation import Rate


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
        margins=2 * kept.float() - 1,
        distances=torch.arange(readings, dtype=torch.float64),
        task_losses=torch.tensor(task or [3.0, 2.0, 1.5, 1.0]),
    )


def ends_with(lost: int, anchors: int = 64) -> Tensor:
    kept = torch.ones(3, anchors, dtype=torch.bool)
    kept[1, : lost // 2] = False
    kept[2, :lost] = False
    return kept


def test_share_is_the_mean_and_the_interval_spans_the_pilots() -> None:
    made = forecast([pilot(ends_with(16)), pilot(ends_with(24))])
    assert made.lost.tolist() == pytest.approx([0, 10 / 64, 20 / 64])
    assert float(made.low[-1]) == pytest.approx(Rate(16, 64).interval()[0])
    assert float(made.high[-1]) == pytest.approx(Rate(24, 64).interval()[1])
    assert made.first_step_over() == 64.0
    assert made.low[0] == made.high[0] == 0


def test_pilots_that_disagree_and_few_anchors_are_no_go_ahead() -> None:
    assert forecast([pilot(ends_with(0)), pilot(ends_with(30))]).verdict is Verdict.CAUTION
    assert forecast([pilot(ends_with(0, anchors=34))]).verdict is Verdict.CAUTION
    assert forecast([pilot(ends_with(0, anchors=35))]).verdict is Verdict.GO


def test_openings_that_sampling_loses_are_no_go_ahead() -> None:
    sure = pilot(ends_with(0))
    weak = replace(sure, chances=sure.chances * torch.tensor([0.9, 0.8, 0.5])[:, None])
    made = forecast([sure, weak])
    assert made.verdict is Verdict.CAUTION
    assert float(made.high[-1]) == pytest.approx(1 - 0.5 / 0.9)
    assert float(made.lost[-1]) == 0


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
