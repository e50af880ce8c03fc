"""Counts with their interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Rate:
    """How often something happened: ``count`` of ``total``.

    Raises:
        ValueError: ``total`` is not positive or ``count`` lies outside ``[0, total]``.
    """

    count: int
    total: int

    def __post_init__(self) -> None:
        if self.total <= 0 or not 0 <= self.count <= self.total:
            raise ValueError(f"a rate needs 0 <= count <= total > 0; got {self.count}/{self.total}")

    @property
    def value(self) -> float:
        """``count / total``."""
        return self.count / self.total

    def interval(self, z: float = Z_95) -> tuple[float, float]:
        """Wilson score interval (Wilson 1927) of the underlying probability.

        With ``p = count / total`` and ``n = total``::

            (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n)

        Args:
            z: Normal quantile; 1.96 gives 95 %.
        """
        p, n = self.value, self.total
        centre = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
