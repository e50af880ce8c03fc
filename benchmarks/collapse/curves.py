"""Pareto curves from result files: what each setting of a method reached, and on which seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.collapse.variants import DEFAULT, SuitePlan, Sweep, Variant

Facts = Mapping[str, Any]
Array = NDArray[np.float64]
Cells = Mapping[tuple[str, int], Facts]  # by task and seed
OCCASION = timedelta(hours=2)  # apart, runs are not timed against one another


@dataclass(frozen=True)
class Shares:
    """How often something happened, per setting, task and seed.

    Attributes:
        rates: shares, (settings, tasks, seeds).
        outcomes: 1 where it happened, one a prompt, (settings, tasks, seeds, prompts); None when a
            result does not hold them.
    """

    rates: Array
    outcomes: Array | None

    def at(self, seeds: Sequence[int]) -> Shares:
        """Some of the seeds, by position."""
        outcomes = None if self.outcomes is None else self.outcomes[:, :, seeds]
        return Shares(self.rates[:, :, seeds], outcomes)


@dataclass(frozen=True)
class Curve:
    """A method's outcomes.

    Attributes:
        method: its name.
        label: what tables call it.
        settings: names of the variants that were run.
        planned: how many settings there should be.
        tasks: names of the tasks.
        seeds: seeds that every setting and task has.
        task: task score, (settings, tasks, seeds); see `task_score`.
        asr: harmful prompts answered.
        over_refusal: harmless prompts refused.
        aligned_over_refusal: of the aligned model, (tasks, seeds).
        nll: what the task score is made from, (settings, tasks, seeds), nats a token; None where it
            is an accuracy.
    """

    method: str
    label: str
    settings: tuple[str, ...]
    planned: int
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    task: Array
    asr: Shares
    over_refusal: Shares
    aligned_over_refusal: Array
    nll: Array | None = None

    def at_seeds(self, seeds: Sequence[int]) -> Curve:
        """The same curve on some of its seeds."""
        places = [self.seeds.index(seed) for seed in seeds]
        return replace(
            self,
            seeds=tuple(seeds),
            task=self.task[:, :, places],
            asr=self.asr.at(places),
            over_refusal=self.over_refusal.at(places),
            aligned_over_refusal=self.aligned_over_refusal[:, places],
            nll=None if self.nll is None else self.nll[:, :, places],
        )


def curves(plan: SuitePlan, results: Sequence[Facts]) -> list[Curve]:
    """A curve for every method of the sweep of which a setting was run on AdamW's seeds."""
    sweep = plan.sweep
    if sweep is None:
        return []
    mine = [r for r in results if r["seed"] in sweep.seeds]
    rows = plan.curves()
    adamw = cells_of(rows["adamw"][0], mine)
    built = (_curve(sweep, variants, mine, adamw) for variants in rows.values() if variants)
    return [curve for curve in built if curve is not None]


def cells_of(variant: Variant, results: Sequence[Facts]) -> dict[tuple[str, int], Facts]:
    """The results of a variant by task and seed."""
    return {(r["task"], r["seed"]): r for r in results if variant.made(r)}


def _curve(
    sweep: Sweep, variants: Sequence[Variant], results: Sequence[Facts], adamw: Cells
) -> Curve | None:
    found = {v.name: cells_of(v, results) for v in variants}
    run = {name: cells for name, cells in found.items() if cells}
    tasks = sorted({task for task, _ in adamw})
    seeds = [
        seed
        for seed in sweep.seeds
        if all((t, seed) in cells for t in tasks for cells in (adamw, *run.values()))
    ]
    if not (run and seeds and tasks):
        return None

    def array(figure: Any) -> Array:
        rows = [[[figure(cells, t, n) for n in seeds] for t in tasks] for cells in run.values()]
        return np.array(rows, dtype=np.float64)

    def shares(metric: str, prompts: str, refused: bool) -> Shares:
        held = all("refused" in c[t, n] for c in run.values() for t in tasks for n in seeds)
        hits = str(int(refused))
        return Shares(
            array(lambda cells, t, n: cells[t, n]["final"][metric]),
            array(lambda cells, t, n: [b == hits for b in cells[t, n]["refused"][prompts]])
            if held
            else None,
        )

    over = [[adamw[t, n]["aligned"]["over_refusal"] for n in seeds] for t in tasks]
    return Curve(
        method=variants[0].method,
        label=variants[0].label,
        settings=tuple(run),
        planned=sweep.settings,
        tasks=tuple(tasks),
        seeds=tuple(seeds),
        task=array(lambda cells, t, n: task_score(cells[t, n], adamw[t, n], sweep.task)),
        asr=shares("asr", "harmful", refused=False),
        over_refusal=shares("over_refusal", "harmless", refused=True),
        aligned_over_refusal=np.array(over),
        nll=array(lambda cells, t, n: cells[t, n]["final"][sweep.task])
        if sweep.task.endswith("nll")
        else None,
    )


def task_score(result: Facts, adamw: Facts, metric: str) -> float:
    """The task metric between 0 and 1.

    An accuracy as it is; of an NLL the share of AdamW's progress, (l* - l) / (l* - l_AdamW), with
    l* the aligned model's.
    """
    value = float(result["final"][metric])
    if not metric.endswith("nll"):
        return value
    start, best = result["aligned"][metric], adamw["final"][metric]
    return float(np.clip((start - value) / (start - best), 0, 1))


def paired_with_adamw(
    plan: SuitePlan, results: Sequence[Facts], method: str
) -> list[tuple[Facts, Facts]]:
    """A method's default results with AdamW's of the same task and seed, where both have costs."""
    default = {v.method: v for v in plan.variants if v.name == DEFAULT}
    measured = [r for r in results if "cpu_seconds" in r]
    own, adamw = (cells_of(default[name], measured) for name in (method, "adamw"))
    return [(own[key], adamw[key]) for key in sorted(own.keys() & adamw.keys())]


def time_ratios(pairs: Sequence[tuple[Facts, Facts]]) -> list[float]:
    """CPU times over AdamW's, of runs of one occasion: speeds differ else."""
    return [
        own["cpu_seconds"] / adamw["cpu_seconds"]
        for own, adamw in pairs
        if "cpu_seconds" in own and "cpu_seconds" in adamw
        if _are_of_one_occasion(own, adamw)
    ]


def _are_of_one_occasion(one: Facts, other: Facts) -> bool:
    # Processors of one name can be machines of different speed.
    began = [datetime.fromisoformat(facts["date"]) for facts in (one, other)]
    return one["processor"] == other["processor"] and abs(began[0] - began[1]) <= OCCASION
