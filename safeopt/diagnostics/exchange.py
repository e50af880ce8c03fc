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
    """The exchange's power, in [0, 1], with a bootstrap over anchors.

    Without anything to measure (no anchor has moved, or all pilots have one rate) it is `USUAL`,
    and the interval is [0, 1].
    """
    held = pilots[0].kept[0]
    falls = [p.margins[:1, held].double() - p.margins[:, held].double() for p in pilots]
    rates = [pilot.compression for pilot in pilots]
    found = _power(rates, [fall.mean(1) for fall in falls])
    if found is None:
        return Estimate(USUAL, 0.0, 1.0)
    generator, draws = torch.Generator().manual_seed(0), []
    for _ in range(_DRAWS):
        pick = torch.randint(int(held.sum()), (int(held.sum()),), generator=generator)
        drawn = _power(rates, [fall[:, pick].mean(1) for fall in falls])
        draws.append(USUAL if drawn is None else drawn)
    tail = (1 - confidence) / 2
    ends = torch.tensor(draws, dtype=torch.float64).quantile(
        torch.tensor([tail, 1 - tail]).double()
    )
    return Estimate(found, min(found, float(ends[0])), max(found, float(ends[1])))


def _power(rates: Sequence[float], falls: Sequence[Tensor]) -> float | None:
    """The median over pairs of pilots and over the slower one's later readings, if there is one."""
    last = len(falls[0]) - 1
    found = []
    for i, slow in enumerate(falls):
        for j, fast in enumerate(falls):
            if rates[j] < 1.05 * rates[i]:
                continue
            for reading in range(last // 2 + last % 2, last + 1):
                exchanged = _exchange(rates[j] / rates[i], reading, float(slow[reading]), fast)
                found += [] if exchanged is None else [exchanged]
    return float(torch.tensor(found, dtype=torch.float64).median()) if found else None


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
