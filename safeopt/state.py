"""Whether a saved state is a guard's and whole, asked before any of it is taken over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_ADDED = ("anchors", "reference", "has_looked_again")  # states of older versions lack them


def check_whole(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise unless ``state`` has every key of ``own``, those of its parts included.

    Raises:
        ValueError: says what to load it into, or what it lacks.
    """
    if "passport" in state:
        raise ValueError(
            "this state is of a guard from a passport: load it into one that "
            "Guard.from_passport(model, path, check_weights=False) makes"
        )
    lacking = list(_lacking(state, own))
    if lacking:
        raise ValueError(
            f"this is no whole state of a guard, it lacks {', '.join(lacking)}; pass what the "
            "guard's state_dict() returned"
        )


def _lacking(state: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    for name, part in own.items():
        if name not in state:
            yield name
        elif isinstance(part, Mapping):
            keys = [key for key in part if key not in _ADDED and key not in state[name]]
            yield from (f"{name}.{key}" for key in keys)
