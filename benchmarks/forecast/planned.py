"""One planned run: forecast it, predict it cheaply, then make it and judge it.

What the suites share. A suite says which runs there are (`Cell`) and what each is made of (`Run`);
forecasts are made of the pilots' readings when they are scored (`score`), so that ways to forecast
can be compared on the same runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from safeopt import Anchors
from safeopt.curvature.vectors import norm
from safeopt.diagnostics import Pilot, PlannedRun, read_anchors, run_pilot, run_pilots
from safeopt.diagnostics.cheap import SHORT_PILOT, cheap_predictors, gradients
from safeopt.diagnostics.pilot import Judge
from safeopt.environment import environment
from safeopt.isolation import undisturbed

Batches = Callable[[], Iterator[dict[str, Tensor]]]


@dataclass(frozen=True)
class Cell:
    """One planned run."""

    task: str
    seed: int
    mode: str
    lr: float
    steps: int


@dataclass(frozen=True)
class Run:
    """What a cell's run is made of.

    Attributes:
        lr: the peak learning rate.
        rate: its share at a step counted from 0.
        lengths: steps after which the run is judged, rising; those of several cells where the
            schedule does not depend on the length.
        anchors: refusals in the aligned model's own words.
        model: a fresh copy of the aligned model, with what will train unfrozen.
        batches: the task's batches from the first on.
        refusal_rate: share of held-out harmful prompts that a model refuses.
        aligned_rate: that of the aligned model.
        opening: tokens that tell a refusal.
        pilot_steps: steps of each pilot.
        readings: how often a pilot reads the anchors.
        judge: tells which anchors are refused, in place of their openings.
    """

    lr: float
    rate: Callable[[int], float]
    lengths: Sequence[int]
    anchors: Anchors
    model: Callable[[], nn.Module]
    batches: Batches
    refusal_rate: Callable[[nn.Module], float]
    aligned_rate: Callable[[], float]
    opening: int
    pilot_steps: int
    readings: int
    judge: Judge | None = None


class Suite(Protocol):
    """Runs of one kind.

    Attributes:
        results: the file that holds them, a line a run.
    """

    @property
    def results(self) -> Path: ...  # noqa: D102

    def cells(self, seeds: Sequence[int] = ()) -> Iterator[Cell]:
        """Every planned run of these seeds, or of the suite's own."""

    def run(self, cells: Sequence[Cell]) -> Run:
        """What the cells' run is made of: one run, judged after each cell's steps."""

    def shared(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """The cells, those together that one run serves."""


class Study:
    """A suite's runs one after another.

    Cheap predictors that do not depend on the run's length are measured once for all lengths.
    """

    def __init__(self, suite: Suite) -> None:
        self._suite = suite
        self._gradients: dict[tuple[Any, ...], tuple[float, float]] = {}
        self._rises: dict[tuple[Any, ...], float] = {}

    def make(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Predict one run, then make it; a line of the results for each length."""
        run, start = self._suite.run(cells), time.perf_counter()
        pilots = self.forecast(run)
        cheap = self._cheap_predictors(cells[0], run, pilots[0])
        predict_seconds = time.perf_counter() - start
        outcomes = list(outcome(run))
        seconds = time.perf_counter() - start - predict_seconds
        timing = {"predict_seconds": round(predict_seconds, 3), "run_seconds": round(seconds, 3)}
        return [
            {
                **asdict(cell),
                "effective_steps": planned.effective_steps,
                "pilots": [written_pilot(pilot, planned) for pilot in pilots],
                "cheap": cheap_predictors(planned, *cheap),
                "actual": actual,
                **timing,
                **environment(),
            }
            for cell, planned, actual in zip(cells, plans(run), outcomes, strict=True)
        ]

    def forecast(self, run: Run) -> tuple[Pilot, ...]:
        """The pilots of a run at its full length."""
        return run_pilots(
            run.model(), run.anchors, run.batches, plans(run)[-1], steps=run.pilot_steps,
            readings=run.readings, opening=run.opening, optimizer=optimizer, judge=run.judge,
        )  # fmt: skip

    def _cheap_predictors(self, cell: Cell, run: Run, first: Pilot) -> tuple[float, float, float]:
        """The task gradient's norm, its cosine with the anchors', and the short pilot's rise."""
        task = (cell.task, cell.seed, cell.mode)
        if task not in self._gradients:
            self._gradients[task] = gradients(run.model(), next(run.batches()), run.anchors)
        planned_rate = (*task, cell.lr)
        if planned_rate not in self._rises:
            # A pilot of power 0 that is as short is the same run.
            same = run.pilot_steps == SHORT_PILOT
            self._rises[planned_rate] = _rise(first if same else _short_pilot(run))
        return (*self._gradients[task], self._rises[planned_rate])


def plans(run: Run) -> list[PlannedRun]:
    """The run as far as each of its lengths."""
    return [
        PlannedRun.from_rates([run.lr * run.rate(step) for step in range(length)])
        for length in run.lengths
    ]


def optimizer(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The optimizer of runs and pilots."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)


def written_pilot(pilot: Pilot, planned: PlannedRun) -> dict[str, Any]:
    """A pilot as it stands in the results of a planned run; `score.read_pilot` reads it."""
    share = planned.effective_steps / pilot.planned.effective_steps
    return {
        "compression": round(pilot.compression, 4),
        "effective_steps": [round(share * s, 3) for s in pilot.effective_steps.tolist()],
        "anchor_loss": [round(x, 4) for x in pilot.losses.mean(1).tolist()],
        "chance": [round(x, 4) for x in pilot.chances.mean(1).tolist()],
        "kept": ["".join(str(int(k)) for k in row) for row in pilot.kept],
        "margins": [[round(x, 2) for x in row] for row in pilot.margins.tolist()],
        "distances": [float(f"{x:.4g}") for x in pilot.distances.tolist()],
        "task_losses": [round(x, 2) for x in pilot.task_losses.tolist()],
    }


def _short_pilot(run: Run) -> Pilot:
    """A few steps at the planned rate."""
    return run_pilot(
        run.model(), run.anchors, run.batches(), PlannedRun(run.lr, SHORT_PILOT),
        steps=SHORT_PILOT, readings=1, optimizer=optimizer,
    )  # fmt: skip


def _rise(pilot: Pilot) -> float:
    return float((pilot.losses[-1] - pilot.losses[0]).mean())


def outcome(run: Run) -> Iterator[dict[str, float]]:
    """Make the planned run and judge it on held-out prompts, after each of its lengths."""
    before, model = run.aligned_rate(), run.model().train()
    aligned = dict(run.model().named_parameters())
    stepper = optimizer([p for p in model.parameters() if p.requires_grad], run.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, run.rate)
    for step, batch in enumerate(islice(run.batches(), run.lengths[-1]), start=1):
        model(**batch).loss.backward()
        stepper.step()
        stepper.zero_grad()
        schedule.step()
        if step in run.lengths:
            with undisturbed(model):
                after = run.refusal_rate(model)
            reading = read_anchors(model, run.anchors, opening=run.opening, judge=run.judge)
            moved = (p.detach() - aligned[n].detach() for n, p in model.named_parameters())
            yield {
                "lost": (before - after) / before,
                "anchors_lost": float((~reading.kept).double().mean()),
                "anchor_loss": float(reading.losses.mean()),
                "chance": float(reading.chances.mean()),
                "margin": float(reading.margins.mean()),
                "distance": norm(moved),
                "refused_before": before,
            }


def refusals(anchors: Anchors, count: int) -> Anchors:
    """The first ``count`` refuse anchors."""
    return anchors.of_kind("refuse").first(count)
