"""Monitor: the forecast made again and again while a run goes on."""

from __future__ import annotations

from torch import nn

from safeopt.anchors import Anchors
from safeopt.diagnostics.forecast import Verdict
from safeopt.diagnostics.pilot import Reading, read_anchors
from safeopt.intervals import Rate


class Monitor:
    """Reads the anchors now and then, and forecasts the end of the run from what it has read.

    The share of anchors lost goes on as it did between the last two readings; Wilson's interval of
    the present share goes with it. The verdict is NO-GO while the interval's lower end at the run's
    end lies above the tolerance. Cost: a forward pass of the anchors a reading.

    Args:
        anchors: the anchors; those that the model does not open by itself at the first reading do
            not count.
        steps: steps of the whole run.
        tolerance: share of the anchors that may be lost.
        opening: see `read_anchors`.

    Attributes:
        verdict: that of the last reading.
    """

    def __init__(
        self, anchors: Anchors, steps: int, *, tolerance: float = 0.1, opening: int = 4
    ) -> None:
        self._anchors, self._steps = anchors, steps
        self._tolerance, self._opening = tolerance, opening
        self._first: Reading | None = None
        self._last = (0, 0.0, 0.0, 0.0)  # step, share lost, mean loss, its change a step
        self.verdict = Verdict.INCONCLUSIVE

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Read the anchors after ``step`` steps.

        Raises:
            ValueError: at the first reading, the model opens no anchor as its reply does.
        """
        reading = read_anchors(model, self._anchors, opening=self._opening)
        if self._first is None:
            if not bool(reading.kept.any()):
                raise ValueError(
                    "the model opens none of its replies as the anchors do, so there is nothing to "
                    "monitor: write its own replies into the anchors"
                )
            self._first, self._last = reading, (step, 0.0, float(reading.losses.mean()), 0.0)
        held = self._first.kept
        now = Rate(int((~reading.kept[held]).sum()), int(held.sum()))
        return self._judge(step, now, float(reading.losses.mean()))

    def _judge(self, step: int, now: Rate, loss: float) -> dict[str, float]:
        before, lost, loss_before, velocity_before = self._last
        gone = max(1, step - before)
        velocity = (loss - loss_before) / gone
        ahead = (now.value - lost) / gone * max(0, self._steps - step)
        low, high = (min(1.0, max(0.0, end + ahead)) for end in now.interval())
        self.verdict = Verdict.CAUTION
        if low > self._tolerance:
            self.verdict = Verdict.NO_GO
        elif high <= self._tolerance:
            self.verdict = Verdict.GO
        self._last = (step, now.value, loss, velocity)
        return {
            "safety/loss": loss,
            "safety/lost": now.value,
            "safety/velocity": velocity,
            "safety/acceleration": (velocity - velocity_before) / gone,
            "safety/forecast_lost": min(1.0, max(0.0, now.value + ahead)),
            "safety/forecast_low": low,
            "safety/forecast_high": high,
        }
