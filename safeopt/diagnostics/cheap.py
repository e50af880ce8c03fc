"""Predictors of a planned run that cost next to nothing, for a forecast to be held against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from safeopt.anchors import Anchors
from safeopt.curvature.vectors import norm
from safeopt.diagnostics.pilot import Batch, Pilot, PlannedRun, TaskLoss, mean_nll, training
from safeopt.geometry.capture import logits_of
from safeopt.geometry.coverage import device_of
from safeopt.losses import reply_nll

SHORT_PILOT = 10
"""Steps after which the anchor loss is read."""

NAMES = {
    "accumulated_rate": "learning rate × steps",
    "gradient_norm": "learning rate × steps × gradient norm",
    "gradient_cosine": "learning rate × steps × cosine with the anchors",
    "short_pilot": f"rise of the anchor loss in {SHORT_PILOT} steps",
}
"""What the predictors are called; each rises with the danger."""


def cheap_predictors(
    planned: PlannedRun, gradient: float, cosine: float, rise: float
) -> dict[str, float]:
    """Values by the keys of `NAMES`.

    Args:
        planned: the run.
        gradient: norm of the first task gradient.
        cosine: its cosine with the gradient of the mean anchor loss; a step goes against it.
        rise: of the mean anchor loss after `SHORT_PILOT` steps, nats.
    """
    accumulated = planned.learning_rate * planned.effective_steps
    return {
        "accumulated_rate": accumulated,
        "gradient_norm": accumulated * gradient,
        "gradient_cosine": -accumulated * cosine,
        "short_pilot": rise,
    }


def gradients(
    model: nn.Module,
    batch: Batch,
    anchors: Anchors,
    *,
    loss: TaskLoss = mean_nll,
    at_once: int = 16,
) -> tuple[float, float]:
    """Norm of the task gradient, and its cosine with that of the mean anchor loss.

    Args:
        model: the model, with what will train unfrozen; left as it was.
        batch: the first task batch, on the model's device.
        anchors: the anchors.
        loss: the task loss of a batch.
        at_once: anchors in one forward-backward.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    indices = list(range(len(anchors)))
    with training(model):
        loss(model, batch).backward()
        task = _taken(trained)
        for start in indices[::at_once]:
            part = anchors.batch(indices[start : start + at_once]).to(device_of(model))
            (reply_nll(logits_of(model, part), part.labels).sum() / len(anchors)).backward()
        safety = _taken(trained)
    dot = sum(float((t * s).sum()) for t, s in zip(task, safety, strict=True))
    return norm(task), dot / max(norm(task) * norm(safety), 1e-30)


def _taken(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return found


def rise_after(pilot: Pilot, steps: int = SHORT_PILOT) -> float:
    """Rise of the mean anchor loss in a pilot's first steps, read between its readings.

    The pilot's rate must be the run's own, or it is nan.
    """
    if pilot.compression > 1:
        return math.nan
    count = len(pilot.task_losses)
    at = pilot.effective_steps * (count / float(pilot.effective_steps[-1]))
    rises = pilot.losses.double().mean(1) - float(pilot.losses[0].double().mean())
    after = int(torch.searchsorted(at, float(steps)))
    if after >= len(at):
        return float(rises[-1])
    share = (steps - float(at[after - 1])) / float(at[after] - at[after - 1])
    return float((1 - share) * rises[after - 1] + share * rises[after])
