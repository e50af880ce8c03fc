"""At which exchange a pilot's longer steps stand for more steps, measured on pilots.

Steps at c times the rate do in k steps what steps at the rate do in k c^(1/power): power 1/2 where
steps decorrelate, 1 where all point one way. It depends on the model, the task, the rate and on
what trains, and so it is read off: where one pilot's anchors have fallen as far after k steps as
another's, with a higher rate, after k*, power = log(c' / c) / log(k / k*).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from safeopt.diagnostics.lookahead import Estimate
from safeopt.diagnostics.pilot import Pilot

USUAL = 0.5
"""The power of steps that decorrelate, where nothing can be measured."""

_DRAWS = 200
_NOISE = 0.05  # fall of the mean margin, in logits, below which nothing has happened


def measure_power(pilots: Sequence[Pilot], *, confidence: float = 0.9) -> Estimate:
    """The exchange's power, in [0, 1]: the median over pairs of pilots and their readings.

    The interval is that of `power_draws`. Without anything to measure (no anchor has moved, or all
    pilots have one rate) the power is `USUAL`, and the interval is [0, 1].
    """
    rates, falls = _falls(pilots)
    found = _powers(rates, [fall.mean(1) for fall in falls])
    if not found:
        return Estimate(USUAL, 0.0, 1.0)
    value = float(torch.tensor(found, dtype=torch.float64).median())
    tail = (1 - confidence) / 2
    low, high = power_draws(pilots).quantile(torch.tensor([tail, 1 - tail]).double()).tolist()
    return Estimate(value, min(value, low), max(value, high))


def power_draws(pilots: Sequence[Pilot]) -> Tensor:
    """Powers that the pilots leave possible, one a draw.

    The anchors are drawn again, and each pair of pilots and each reading gives a power of its own:
    where one power is too simple a law they disagree, which no bootstrap of their median shows.
    Beside the n of a draw stands one that is known to lie in [0, 1] and no more, so that few
    readings leave much open.
    """
    rates, falls = _falls(pilots)
    total = falls[0].shape[1]
    generator = torch.Generator().manual_seed(0)
    found: list[float] = []
    for _ in range(_DRAWS):
        pick = torch.randint(total, (total,), generator=generator)
        found += _powers(rates, [fall[:, pick].mean(1) for fall in falls])
        found.append(float(torch.rand((), generator=generator)))
    return torch.tensor(found, dtype=torch.float64)


def _falls(pilots: Sequence[Pilot]) -> tuple[list[float], list[Tensor]]:
    """Rates, and falls of the held anchors' margins at each reading, (R, N) each."""
    held = pilots[0].kept[0]
    falls = [p.margins[:1, held].double() - p.margins[:, held].double() for p in pilots]
    return [pilot.compression for pilot in pilots], falls


def _powers(rates: Sequence[float], falls: Sequence[Tensor]) -> list[float]:
    """A power for each pair of pilots and later reading of the slower one that tells it."""
    last = len(falls[0]) - 1
    found = []
    for i, slow in enumerate(falls):
        for j, fast in enumerate(falls):
            if rates[j] < 1.05 * rates[i]:
                continue
            for reading in range(last // 2 + last % 2, last + 1):
                exchanged = _exchange(rates[j] / rates[i], reading, float(slow[reading]), fast)
                found += [] if exchanged is None else [exchanged]
    return found


def _exchange(faster: float, reading: int, level: float, fast: Tensor) -> float | None:
    """The power by which ``fast`` is at ``level`` as late as it is; None where nothing shows."""
    if level < _NOISE:
        return None
    above = torch.nonzero(fast >= level).flatten()
    if not len(above):
        return 0.0  # longer steps do not do more
    at = int(above[0])
    before, after = float(fast[at - 1]), float(fast[at])
    crossing = at - 1 + (level - before) / (after - before)
    if crossing >= reading:
        return 0.0
    return min(1.0, math.log(faster) / math.log(reading / max(crossing, 1e-6)))
