"""From pilots to a forecast: what the planned run does to the anchors, with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from safeopt.diagnostics.pilot import Pilot
from safeopt.intervals import Rate

WINDOW = 8.0
"""Compression beyond which a pilot is no witness any more."""


class Verdict(str, Enum):
    """What the forecast says of a planned run."""

    GO = "GO"
    CAUTION = "CAUTION"
    NO_GO = "NO-GO"
    INCONCLUSIVE = "INCONCLUSIVE"

    @property
    def exit_code(self) -> int:
        """0 to go on, 3 to stop, 4 if nobody knows."""
        return {Verdict.NO_GO: 3, Verdict.INCONCLUSIVE: 4}.get(self, 0)


@dataclass(frozen=True)
class Forecast:
    """The anchors along the planned run.

    Attributes:
        effective_steps: planned steps at full rate, (R,).
        anchor_loss: mean anchor loss there, nats per token, (R,).
        lost: share of the openings kept at the start that are lost there, (R,).
        low: lower end of the interval of ``lost``, (R,).
        high: upper end, (R,).
        tolerance: share that may be lost.
        verdict: the judgement of the last reading.
        reason: one sentence on why.
    """

    effective_steps: Tensor
    anchor_loss: Tensor
    lost: Tensor
    low: Tensor
    high: Tensor
    tolerance: float
    verdict: Verdict
    reason: str

    def first_step_over(self) -> float | None:
        """Effective steps after which ``lost`` passes the tolerance; None if it does not."""
        over = torch.nonzero(self.lost > self.tolerance).flatten()
        return float(self.effective_steps[over[0]]) if len(over) else None


def forecast(
    pilots: Sequence[Pilot], *, tolerance: float = 0.1, window: float = WINDOW
) -> Forecast:
    """Forecast the share of anchors that the planned run loses.

    The forecast is the mean over pilots. The interval spans the pilots, each with Wilson's 95 %
    interval for its anchors: how far the run really travels is known only as well as pilots of
    different powers agree, and few anchors say little even if all of them are kept (35 are needed
    to know that fewer than 10 % are lost). It also holds the share that sampling, and not greedy
    decoding, loses: greedy openings all flip together, and their probabilities fall before that.

    Args:
        pilots: compressed pilots of one planned run on one set of anchors.
        tolerance: share of the kept openings that may be lost.
        window: largest compression that is believed, of the middle pilot.

    Raises:
        ValueError: no pilot, pilots of several runs, or a model that keeps no opening to begin
            with.
    """
    if not pilots:
        raise ValueError("a forecast needs at least one pilot")
    if len({pilot.planned for pilot in pilots}) > 1:
        raise ValueError("the pilots stand for different planned runs")
    at_start = pilots[0].kept[0]
    if not bool(at_start.any()):
        raise ValueError(
            "the model opens none of its replies as the anchors do: anchors must be what the "
            "aligned model itself says; write its own replies into them"
        )
    lost = torch.stack([(~pilot.kept[:, at_start]).sum(1) for pilot in pilots])  # (P, R)
    total = int(at_start.sum())
    low, high = _interval(lost, total)
    high = torch.maximum(high, torch.stack([_lost_by_sampling(p) for p in pilots]).amax(0))
    share = lost.double().mean(0) / total
    verdict, reason = _judge(pilots, share, low, high, tolerance, window)
    return Forecast(
        effective_steps=pilots[0].effective_steps,
        anchor_loss=torch.stack([pilot.losses for pilot in pilots]).double().mean((0, 2)),
        lost=share,
        low=low,
        high=high,
        tolerance=tolerance,
        verdict=verdict,
        reason=reason,
    )


def _interval(lost: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The span of the pilots' own intervals at each reading; nothing is lost at the start."""
    ends = torch.tensor(
        [[Rate(count, total).interval() for count in row] for row in lost.tolist()],
        dtype=torch.float64,
    )
    low, high = ends[..., 0].amin(0), ends[..., 1].amax(0)
    low[0], high[0] = 0.0, 0.0
    return low, high


def _lost_by_sampling(pilot: Pilot) -> Tensor:
    """1 - mean opening probability over that at the start, within [0, 1], per reading."""
    chances = pilot.chances.double().mean(1)
    return (1 - chances / chances[0]).clamp(0, 1)


def _judge(
    pilots: Sequence[Pilot],
    lost: Tensor,
    low: Tensor,
    high: Tensor,
    tolerance: float,
    window: float,
) -> tuple[Verdict, str]:
    compression = sorted(pilot.compression for pilot in pilots)[(len(pilots) - 1) // 2]
    if compression > window:
        return Verdict.INCONCLUSIVE, (
            f"the pilot would have to step {compression:.1f} times as far as the run does, beyond "
            f"its window of {window:g}; give the pilot more steps"
        )
    if any(_diverged(pilot) for pilot in pilots):
        return Verdict.INCONCLUSIVE, (
            "the task loss rose during the pilot, whose steps are too long for it; give the pilot "
            "more steps, or lower the learning rate"
        )
    expected = f"{100 * float(lost[-1]):.0f} % of the anchors are expected to be lost"
    between = f"({100 * float(low[-1]):.0f} to {100 * float(high[-1]):.0f} %)"
    reason = f"{expected} {between}; {100 * tolerance:.0f} % may be"
    if float(low[-1]) > tolerance:
        return Verdict.NO_GO, reason
    if float(high[-1]) <= tolerance:
        return Verdict.GO, reason
    return Verdict.CAUTION, reason


def _diverged(pilot: Pilot) -> bool:
    quarter = max(1, len(pilot.task_losses) // 4)
    end = pilot.task_losses[-quarter:].mean()
    return not bool(end <= pilot.task_losses[:quarter].max())
