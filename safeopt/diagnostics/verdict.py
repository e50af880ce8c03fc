"""What is said of a planned run."""

from __future__ import annotations

from enum import Enum


class Verdict(str, Enum):
    """What a forecast says of a planned run."""

    GO = "GO"
    CAUTION = "CAUTION"
    NO_GO = "NO-GO"
    INCONCLUSIVE = "INCONCLUSIVE"

    @property
    def exit_code(self) -> int:
        """0 to go on, 3 to stop, 4 if nobody knows."""
        return {Verdict.NO_GO: 3, Verdict.INCONCLUSIVE: 4}.get(self, 0)
