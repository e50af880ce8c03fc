"""The suites by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.collapse.suite import Suite


def make_suite(name: str, seed: int, options: Mapping[str, Any]) -> Suite:
    """Build one seed of a suite.

    Args:
        name: "world", "world_lora", "smol" or "smol_lora".
        seed: seed of the suite's model, anchors and batches.
        options: differences from the suite's default configuration.
    """
    if name == "world":
        from benchmarks.collapse.world import World, WorldConfig

        return World(seed, WorldConfig(**options))
    if name == "world_lora":
        from benchmarks.collapse.world import LORA_RANK, LoraWorld, WorldConfig

        return LoraWorld(seed, WorldConfig(**({"lora_rank": LORA_RANK} | dict(options))))
    if name == "smol":
        from benchmarks.collapse.smol import Smol, SmolConfig

        return Smol(seed, SmolConfig(**options))
    if name == "smol_lora":
        from benchmarks.collapse.smol import LORA_RANK, LoraSmol, SmolConfig

        return LoraSmol(seed, SmolConfig(**({"lora_rank": LORA_RANK} | dict(options))))
    raise ValueError(f"unknown suite {name!r}; known: world, world_lora, smol, smol_lora")
