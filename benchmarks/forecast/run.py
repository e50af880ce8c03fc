"""Forecast runs of the synthetic world, then make them: ``python -m benchmarks.forecast.run``.

A cell is a task, a seed, all weights or a LoRA adapter, a learning rate and a number of steps. It
leaves what the pilots read, the cheap predictors and the outcome in one line of
``results/world.jsonl``; cells that are there are skipped. Forecasts are made of the readings when
they are scored, so that ways to forecast can be compared on the same runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.collapse.suite import RunSettings
from benchmarks.collapse.world import World
from safeopt import Anchors
from safeopt.diagnostics import Pilot, PlannedRun, read_anchors, run_pilot
from safeopt.environment import environment
from safeopt.files import read_jsonl, write_jsonl
from safeopt.geometry.capture import logits_of
from safeopt.losses import reply_nll

RESULTS = Path(__file__).parent / "results" / "world.jsonl"
SEEDS = (3, 4, 5)  # others are for designing the forecast
RATES = {"full": (1.25e-4, 5e-4, 2e-3), "lora": (1e-3, 4e-3)}
STEPS = (60, 240)
ANCHORS = 64
SHORT_PILOT = 10
PILOTS = ((32, 0.3), (32, 0.5), (32, 0.7))
"""Steps and power of each pilot."""
OPENING = 1  # the world's refusals are told by their first word


@dataclass(frozen=True)
class Cell:
    """One planned run."""

    task: str
    seed: int
    mode: str
    lr: float
    steps: int


def cells(seeds: tuple[int, ...] = SEEDS) -> Iterator[Cell]:
    """Every planned run."""
    for seed, task, mode in itertools.product(seeds, World.tasks, RATES):
        for lr, steps in itertools.product(RATES[mode], STEPS):
            yield Cell(task, seed, mode, lr, steps)


def run_cell(cell: Cell) -> dict[str, Any]:
    """Predict one run, then make it."""
    world = World(cell.seed)
    run = replace(world.settings, lr=cell.lr, steps=cell.steps, warmup_steps=cell.steps // 10)
    anchors = refusals(world.anchors(cell.task), ANCHORS)
    start = time.perf_counter()
    predictions = predict(world, cell, run, anchors)
    predict_seconds = time.perf_counter() - start
    actual = outcome(world, cell, run)
    seconds = time.perf_counter() - start - predict_seconds
    timing = {"predict_seconds": round(predict_seconds, 3), "run_seconds": round(seconds, 3)}
    return asdict(cell) | predictions | {"actual": actual} | timing | environment()


def refusals(anchors: Anchors, count: int) -> Anchors:
    """The first ``count`` refuse anchors."""
    chosen = [i for i, kind in enumerate(anchors.kinds) if kind == "refuse"][:count]
    ids, labels = ([t[i].tolist() for i in chosen] for t in (anchors.input_ids, anchors.labels))
    return Anchors.from_tokens(ids, labels)


def model_of(world: World, mode: str) -> nn.Module:
    """The aligned model as it will be trained."""
    model: Any = world.model().train()
    if mode == "full":
        return model  # type: ignore[no-any-return]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        wrapped: nn.Module = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    return wrapped


def predict(world: World, cell: Cell, run: RunSettings, anchors: Anchors) -> dict[str, Any]:
    """What the pilots read, and the cheap predictors."""
    planned = PlannedRun.from_rates([run.lr * run.rate(step) for step in range(run.steps)])
    model, batches = model_of(world, cell.mode), world.batches(cell.task, run.batch_size)
    pilots = [
        run_pilot(
            model, anchors, batches, planned, steps=k, power=power, readings=2, opening=OPENING
        )
        for k, power in PILOTS
    ]
    accumulated = planned.learning_rate * planned.effective_steps
    gradient, cosine = gradients(model, next(batches), anchors)
    cheap = {
        "accumulated_rate": accumulated,
        "gradient_norm": accumulated * gradient,
        "gradient_cosine": -accumulated * cosine,
        "short_pilot": short_pilot(model, anchors, batches, run),
    }
    written = [written_pilot(p, k, power) for p, (k, power) in zip(pilots, PILOTS, strict=True)]
    return {"effective_steps": planned.effective_steps, "pilots": written, "cheap": cheap}


def written_pilot(pilot: Pilot, steps: int, power: float) -> dict[str, Any]:
    """A pilot as it stands in the results; `score.read_pilot` reads it."""
    return {
        "steps": steps,
        "power": power,
        "compression": round(pilot.compression, 4),
        "effective_steps": [round(s, 3) for s in pilot.effective_steps.tolist()],
        "anchor_loss": [round(x, 4) for x in pilot.losses.mean(1).tolist()],
        "chance": [round(x, 4) for x in pilot.chances.mean(1).tolist()],
        "kept": ["".join(str(int(k)) for k in row) for row in pilot.kept],
        "task_losses": [round(x, 2) for x in pilot.task_losses.tolist()],
    }


def gradients(model: nn.Module, batch: dict[str, Tensor], anchors: Anchors) -> tuple[float, float]:
    """Norm of the task gradient, and its cosine with that of the mean anchor loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    task = torch.autograd.grad(model(**batch).loss, trained, allow_unused=True)
    all_anchors = anchors.batch(list(range(len(anchors))))
    safety_loss = reply_nll(logits_of(model, all_anchors), all_anchors.labels).mean()
    safety = torch.autograd.grad(safety_loss, trained, allow_unused=True)
    pairs = [(t, s) for t, s in zip(task, safety, strict=True) if t is not None and s is not None]
    dot = sum(float((t * s).sum()) for t, s in pairs)
    norms = [math.sqrt(sum(float(g.square().sum()) for g in side)) for side in zip(*pairs)]  # noqa: B905
    return norms[0], dot / max(norms[0] * norms[1], 1e-30)


def short_pilot(
    model: nn.Module, anchors: Anchors, batches: Iterator[dict[str, Tensor]], run: RunSettings
) -> float:
    """Rise of the anchor loss over a few steps at the planned rate."""
    pilot = run_pilot(
        model, anchors, batches, PlannedRun(run.lr, SHORT_PILOT), steps=SHORT_PILOT, readings=1
    )
    return float((pilot.losses[-1] - pilot.losses[0]).mean())


def outcome(world: World, cell: Cell, run: RunSettings) -> dict[str, float]:
    """Make the planned run and judge it on held-out prompts."""
    model = model_of(world, cell.mode)
    before = world.refusal_rate(model.eval())
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, run.rate)
    for batch in islice(world.batches(cell.task, run.batch_size), run.steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    after = world.refusal_rate(model.eval())
    anchors = read_anchors(model, refusals(world.anchors(cell.task), ANCHORS), opening=OPENING)
    return {
        "lost": (before - after) / before,
        "anchors_lost": float((~anchors.kept).double().mean()),
        "refused_before": before,
    }


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, nargs="*", default=list(SEEDS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = [row for _, row in read_jsonl(arguments.results)] if arguments.results.exists() else []
    known = {Cell(**{k: row[k] for k in Cell.__dataclass_fields__}) for row in done}
    missing = [cell for cell in cells(tuple(arguments.seed)) if cell not in known]
    for cell in tqdm(missing, unit="run"):
        done.append(run_cell(cell))
        write_jsonl(arguments.results, done)
    print(json.dumps({"runs": len(done)}))


if __name__ == "__main__":
    main()
