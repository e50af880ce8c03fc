"""What a guard may be told, checked before anything is measured or changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, get_args

from safeopt.calibration import Reference
from safeopt.geometry.coverage import Uncovered


@dataclass(frozen=True)
class Setting:
    """What one setting may be.

    Attributes:
        allows: tells whether a value will do.
        words: what will do, for the error.
    """

    allows: Callable[[Any], bool]
    words: str

    def or_none(self) -> Setting:
        """The same, and None."""
        return Setting(lambda value: value is None or self.allows(value), f"{self.words}, or None")


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _choice(words: tuple[str, ...]) -> Setting:
    quoted = ", ".join(f'"{word}"' for word in words)
    return Setting(lambda value: value in words, f"one of {quoted}")


_NUMBER = Setting(_is_number, "a finite number")
_POSITIVE = Setting(lambda value: _is_number(value) and value > 0, "a finite number above 0")
_NOT_NEGATIVE = Setting(lambda value: _is_number(value) and value >= 0, "a finite number, >= 0")
_SHARE = Setting(lambda value: _is_number(value) and 0 < value < 1, "a number between 0 and 1")
_WHOLE = Setting(_is_whole, "a whole number")
_COUNT = Setting(lambda value: _is_whole(value) and value > 0, "a whole number above 0")
_SWITCH = Setting(lambda value: isinstance(value, bool), "True or False")

SETTINGS = {
    "budget": _NUMBER,
    "refresh_every": _COUNT,
    "refresh_within": _COUNT.or_none(),
    "anchors_per_refresh": _COUNT,
    "rank": _COUNT.or_none(),
    "compression_rank": _COUNT.or_none(),
    "eigenvalue_floor": _SHARE,
    "damping": _POSITIVE,
    "retraction_cap": _NOT_NEGATIVE,
    "momentum_orthogonal": _SWITCH,
    "step_limit": _POSITIVE.or_none(),
    "tangent": _SWITCH,
    "retraction": _SWITCH,
    "transport": _SWITCH,
    "reference": _choice(get_args(Reference)),
    "uncovered": _choice(get_args(Uncovered)),
    "seed": _WHOLE,
}


def check_settings(given: Mapping[str, Any]) -> None:
    """Raise if a guard's setting is out of range; names that are none are passed over.

    Raises:
        ValueError: says what the setting may be.
    """
    for name, setting in SETTINGS.items():
        if name in given and not setting.allows(given[name]):
            raise ValueError(f"{name} must be {setting.words}, got {given[name]!r}")
