"""The suites by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.collapse.suite import Suite

if TYPE_CHECKING:
    from benchmarks.collapse.chat import Chat


def make_suite(name: str, seed: int, options: Mapping[str, Any]) -> Suite:
    """Build one seed of a suite.

    Args:
        name: "world", "world_lora", "smol", "smol_lora", "qwen3" or "llama32".
        seed: seed of the suite's model, anchors and batches.
        options: differences from the suite's default configuration.
    """
    if name == "world":
        from benchmarks.collapse.world import World, WorldConfig

        return World(seed, WorldConfig(**options))
    if name == "world_lora":
        from benchmarks.collapse.world import LORA_RANK, LoraWorld, WorldConfig

        return LoraWorld(seed, WorldConfig(**({"lora_rank": LORA_RANK} | dict(options))))
    chat = _chat_suites()
    if name in chat:
        suite = chat[name]
        return suite(seed, replace(suite.usual(), **options))
    raise ValueError(f"unknown suite {name!r}; known: world, world_lora, {', '.join(chat)}")


def _chat_suites() -> dict[str, type[Chat]]:
    from benchmarks.collapse.llm import Llama32, Qwen3
    from benchmarks.collapse.smol import LoraSmol, Smol

    return {suite.name: suite for suite in (Smol, LoraSmol, Qwen3, Llama32)}
