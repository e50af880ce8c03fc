from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from safeopt.diagnostics import Pilot, PlannedRun, Verdict, forecast, measure_power
from safeopt.evaluation import Rate


def pilot(
    kept: Tensor, steps: float = 16.0, task: list[float] | None = None, power: float = 0.5
) -> Pilot:
    """A pilot of four steps."""
    readings, anchors = kept.shape
    planned = PlannedRun(1e-4, steps)
    return Pilot(
        planned=planned,
        compression=planned.compression(4, power),
        effective_steps=torch.linspace(0, steps, readings, dtype=torch.float64),
        losses=torch.rand(readings, anchors),
        kept=kept,
        chances=kept.float(),
        margins=torch.ones(kept.shape),
        distances=torch.arange(readings, dtype=torch.float64),
        task_losses=torch.tensor(task or [3.0, 2.0, 1.5, 1.0]),
    )


def ends_with(lost: int, anchors: int = 64) -> Tensor:
    kept = torch.ones(3, anchors, dtype=torch.bool)
    kept[1, : lost // 2] = False
    kept[2, :lost] = False
    return kept


def falling(power: float, margins: Tensor, sensitivity: float = 8.0) -> Pilot:
    """A pilot whose openings fall with c k^0.75, each by as much: margins (anchors,) at first."""
    steps, readings = 16.0, torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    shell = pilot(torch.ones(5, len(margins), dtype=torch.bool), steps, power=power)
    way = shell.compression * readings**0.75
    left = margins - sensitivity * (way / steps**0.75)[:, None]
    return replace(
        shell,
        effective_steps=readings.double() * steps / 4,
        kept=left > 0,
        chances=torch.sigmoid(left),
        margins=left,
    )


def test_power_is_that_by_which_rate_and_steps_exchange() -> None:
    margins = 4 + 6 * torch.rand(200, generator=torch.Generator().manual_seed(0))
    pilots = [falling(power, margins) for power in (0.0, 0.5, 1.0)]
    found = measure_power(pilots)
    assert found.value == pytest.approx(0.75, abs=0.06)
    assert 0.4 < found.low <= found.value <= found.high <= 1
    # A run at the planned rate goes as far as 16 steps do: a fall by 8.
    made = forecast(pilots)
    assert float(made.lost[-1]) == pytest.approx(float((margins < 8).float().mean()), abs=0.1)
    assert made.low[-1] <= made.lost[-1] <= made.high[-1]
    assert made.verdict is Verdict.NO_GO


def test_longer_steps_that_do_nothing_more_have_power_0_and_still_anchors_none() -> None:
    margins = 4 + 6 * torch.rand(50)
    slow, fast = falling(0.0, margins), falling(0.0, margins)
    assert measure_power([slow, replace(fast, compression=4.0)]).value == 0
    still = [falling(power, margins, sensitivity=0.0) for power in (0.0, 1.0)]
    unknown = measure_power(still)
    assert (unknown.value, unknown.low, unknown.high) == (0.5, 0.0, 1.0)


def test_forecast_lies_between_the_pilots_and_the_interval_spans_the_unknown_power() -> None:
    made = forecast([pilot(ends_with(16), power=0.0), pilot(ends_with(24), power=1.0)])
    assert made.lost.tolist() == pytest.approx([0, 10 / 64, 20 / 64])
    assert (made.power.low, made.power.high) == (0, 1)
    span = Rate(16, 64).interval()[0], Rate(24, 64).interval()[1]
    assert (float(made.low[-1]), float(made.high[-1])) == pytest.approx(span)
    assert made.first_step_over() == 8.0
    assert made.low[0] == made.high[0] == 0


def test_pilots_that_disagree_and_few_anchors_are_no_go_ahead() -> None:
    differ = [pilot(ends_with(0), power=0.0), pilot(ends_with(30), power=1.0)]
    assert forecast(differ).verdict is Verdict.CAUTION
    assert forecast([pilot(ends_with(0, anchors=34))]).verdict is Verdict.CAUTION
    assert forecast([pilot(ends_with(0, anchors=35))]).verdict is Verdict.GO


def test_openings_that_sampling_loses_are_no_go_ahead() -> None:
    sure = pilot(ends_with(0), power=0.0)
    weak = pilot(ends_with(0), power=1.0)
    weak = replace(weak, chances=weak.chances * torch.tensor([0.9, 0.8, 0.5])[:, None])
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
    far = forecast([pilot(ends_with(0), steps=4 * 8.1**2)])
    assert far.verdict is Verdict.INCONCLUSIVE
    assert "more steps" in far.reason
    short = forecast([pilot(ends_with(0), power=0.0)])
    assert short.verdict is Verdict.INCONCLUSIVE  # nothing shows what longer steps would do
    lost_already = forecast([pilot(ends_with(40), power=0.0)])
    assert lost_already.verdict is Verdict.NO_GO
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
