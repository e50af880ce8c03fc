"""A world small enough to bring up in a second, and the real pieces around it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.collapse.suite import RunSettings
from benchmarks.collapse.world import World, WorldConfig


class SmallWorld(World):
    settings = RunSettings(steps=6, lr=1e-3, batch_size=8, evaluate_every=3, warmup_steps=2)


def small_world(name: str, seed: int, options: Mapping[str, Any]) -> SmallWorld:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "layers": 1,
        "heads": 2,
        "pretrain_steps": 3,
        "align_steps": 3,
        "anchors": 12,
        "test_prompts": 16,
    }
    return SmallWorld(seed, WorldConfig(**(sizes | dict(options))))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SmallWorld:
    monkeypatch.setenv("SAFEOPT_CACHE", str(tmp_path / "cache"))
    return small_world("world", 0, {})
