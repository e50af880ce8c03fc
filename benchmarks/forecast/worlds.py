"""Planned runs of the synthetic world."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.collapse.world import World
from benchmarks.forecast.planned import Cell, Run, refusals

RESULTS = Path(__file__).parent / "results" / "world.jsonl"
SEEDS = (3, 4, 5, 6)
DESIGN = 10  # the seed that the forecast was designed on
RATES = {"full": (1.25e-4, 5e-4, 2e-3), "lora": (1e-3, 4e-3)}
STEPS = (60, 240)
ANCHORS = 64
PILOT_STEPS = 32
PARAMETERS = 296_160
OPENING = 1  # the world's refusals are told by their first word


class Worlds:
    """Tasks x learning rates x lengths x seeds x {all weights, LoRA}."""

    results = RESULTS

    def cells(self, seeds: Sequence[int] = ()) -> Iterator[Cell]:
        """Every planned run."""
        for seed, task, mode in itertools.product(seeds or SEEDS, World.tasks, RATES):
            for lr, steps in itertools.product(RATES[mode], STEPS):
                yield Cell(task, seed, mode, lr, steps)

    def shared(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """Every cell is a run of its own: schedules depend on the length."""
        return [[cell] for cell in cells]

    def run(self, cells: Sequence[Cell]) -> Run:
        """The cell's run."""
        (cell,) = cells
        world = _world(cell.seed)
        settings = replace(world.settings, steps=cell.steps, warmup_steps=cell.steps // 10)
        return Run(
            lr=cell.lr,
            rate=settings.rate,
            lengths=[cell.steps],
            anchors=refusals(world.anchors(cell.task), ANCHORS),
            model=lambda: _model(world, cell.mode),
            batches=lambda: world.batches(cell.task, settings.batch_size),
            refusal_rate=world.refusal_rate,
            aligned_rate=lambda: world.refusal_rate(world.model()),
            opening=OPENING,
            pilot_steps=PILOT_STEPS,
            readings=4,
        )


@lru_cache(1)
def _world(seed: int) -> World:
    return World(seed)


def _model(world: World, mode: str) -> nn.Module:
    """The aligned model as it will be trained."""
    model: Any = world.model().train()
    if mode == "full":
        return model  # type: ignore[no-any-return]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        wrapped: nn.Module = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    return wrapped
