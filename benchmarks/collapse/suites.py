"""The suites by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.collapse.suite import Suite


def make_suite(name: str, seed: int, options: Mapping[str, Any]) -> Suite:
    """Build one seed of a suite.

    Args:
        name: "world" or "smol".
        seed: seed of the suite's model, anchors and batches.
        options: differences from the suite's default configuration.
    """
    if name == "world":
        from benchmarks.collapse.world import World, WorldConfig

        return World(seed, WorldConfig(**options))
    if name == "smol":
        from benchmarks.collapse.smol import Smol, SmolConfig

        return Smol(seed, SmolConfig(**options))
    raise ValueError(f"unknown suite {name!r}; known: world, smol")
