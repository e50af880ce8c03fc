"""Monitor: the forecast made again and again while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.anchors import Anchors
from safeopt.curvature import FiniteDifference
from safeopt.curvature.vectors import norm, trainable_parameters
from safeopt.diagnostics.condition import coupling_along, overlap_of, sketch_of
from safeopt.diagnostics.pilot import read_anchors, training
from safeopt.diagnostics.verdict import Verdict
from safeopt.geometry.coverage import device_of, unwrapped
from safeopt.intervals import Rate

_SKETCHED = 16  # anchors in the sketch, whose size grows with them


class Monitor:
    """Reads the anchors now and then, and forecasts the end of the run from what it has read.

    The share of anchors lost goes on as it did between the last two readings; Wilson's interval of
    the present share goes with it. The verdict is NO-GO while the interval's lower end at the run's
    end lies above the tolerance. Cost: a forward pass of the anchors a reading.

    With a ``task`` loss the geometry is measured too, of the mean step since the last measure:
    its overlap ε with the safety subspace of up to 16 anchors at the present weights, and its
    coupling γ to them through the task's curvature. That costs a copy of what trains, a
    forward-backward of those anchors and five of the task's batch, and wants float32 weights.

    Args:
        anchors: the anchors; those that the model does not open by itself at the first reading do
            not count.
        steps: steps of the whole run.
        tolerance: share of the anchors that may be lost.
        opening: see `read_anchors`.
        task: the task loss of a batch at a model's weights; no geometry without it.
        geometry_every: readings between measures of the geometry.

    Attributes:
        verdict: that of the last reading.
    """

    def __init__(
        self,
        anchors: Anchors,
        steps: int,
        *,
        tolerance: float = 0.1,
        opening: int = 4,
        task: Callable[[nn.Module], Tensor] | None = None,
        geometry_every: int = 1,
    ) -> None:
        self._anchors, self._steps = anchors, steps
        self._tolerance, self._opening = tolerance, opening
        self._task, self._geometry_every = task, geometry_every
        self._held: Tensor | None = None  # anchors kept at the first reading
        self._last = (0, 0.0, 0.0, 0.0)  # step, share lost, mean loss, its change a step
        self._readings = 0
        self._before: tuple[int, dict[str, Tensor]] | None = None  # step, weights
        self.verdict = Verdict.INCONCLUSIVE

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; the weights that the last step began at are not kept."""
        return {"held": self._held, "last": self._last, "verdict": self.verdict.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of an earlier monitor of the same anchors."""
        self._held, self._last = state["held"], tuple(state["last"])
        self.verdict = Verdict(state["verdict"])

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Read the anchors after ``step`` steps.

        Raises:
            ValueError: at the first reading, the model opens no anchor as its reply does.
        """
        reading = read_anchors(model, self._anchors, opening=self._opening)
        if self._held is None:
            if not bool(reading.kept.any()):
                raise ValueError(
                    "the model opens none of its replies as the anchors do, so there is nothing to "
                    "monitor: write its own replies into the anchors"
                )
            self._held, self._last = reading.kept, (step, 0.0, float(reading.losses.mean()), 0.0)
        held = self._held
        now = Rate(int((~reading.kept[held]).sum()), int(held.sum()))
        return self._judge(step, now, float(reading.losses.mean())) | self._geometry(model, step)

    def _geometry(self, model: nn.Module, step: int) -> dict[str, float]:
        due, self._readings = self._readings % self._geometry_every == 0, self._readings + 1
        if self._task is None or not due:
            return {}
        now = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
        before, self._before = self._before, (step, now)
        if before is None or before[0] == step:
            return {}
        moved = {name: (w - before[1][name]) / (step - before[0]) for name, w in now.items()}
        with torch.enable_grad():
            return self._measured(unwrapped(model), moved)

    def _measured(self, model: nn.Module, step: Mapping[str, Tensor]) -> dict[str, float]:
        assert self._task is not None
        sketch = sketch_of(model, self._anchors.first(_SKETCHED).batch().to(device_of(model)))
        with training(model):
            self._task(model).backward()
            gradient = norm(p.grad for p in model.parameters() if p.grad is not None)
        product = FiniteDifference(model, check="first")
        bend = coupling_along(model, sketch, step, gradient, self._task, product)
        return {
            "safety/overlap": overlap_of(sketch, step),
            "safety/coupling": float(bend.mean()),
            "safety/coupling_error": product.error,
        }

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
