"""Run one cell: bring a suite, a method and a variant together and write down what happened."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.collapse.methods import METHODS, Earlier, Setup
from benchmarks.collapse.results import (
    FOLDER,
    Cell,
    load,
    save,
    save_failure,
    save_transcripts,
    sha256_of,
)
from benchmarks.collapse.suite import RunSettings, Suite
from benchmarks.collapse.suites import make_suite
from benchmarks.collapse.variants import Variant
from safeopt.environment import environment, peak_memory_mb, reset_peak_memory

_STATUS = Path("/proc/self/status")

MakeSuite = Callable[[str, int, Mapping[str, Any]], Suite]


def run_cell(
    cell: Cell,
    variant: Variant,
    *,
    folder: Path = FOLDER,
    again: bool = False,
    make: MakeSuite = make_suite,
) -> dict[str, Any]:
    """Run a cell, or return its result when it was run before with the same settings.

    Args:
        cell: suite, method, variant, task and seed.
        variant: the variant's settings.
        folder: root of the results.
        again: run it even when a result with these settings is there.
        make: builds the suite.

    Returns:
        The facts in the cell's file.

    Raises:
        Exception: whatever the run raised; a file in ``failed/`` keeps it.
    """
    suite = make(cell.suite, cell.seed, variant.suite)
    run = replace(suite.settings, **variant.run)
    settings = {
        "options": dict(variant.options),
        "run": asdict(run),
        "suite_options": dict(variant.suite),
    }
    known = load(cell, folder)
    if known is not None and not again and known["settings"] == settings:
        return known
    facts = asdict(cell) | {"settings": settings} | environment()
    try:
        facts |= _fine_tune(cell, suite, run, variant, folder)
    except Exception:
        save_failure(cell, facts | {"error": traceback.format_exc()}, folder)
        raise
    save(cell, facts, folder)
    return facts


def _fine_tune(
    cell: Cell, suite: Suite, run: RunSettings, variant: Variant, folder: Path
) -> dict[str, Any]:
    model, anchors = suite.model(), suite.anchors(cell.task)
    aligned = suite.aligned(cell.task)
    reset_peak_memory()
    method = METHODS[cell.method](
        Setup(model, anchors, run, variant.options, cell.seed, _earlier(cell, folder), suite.base)
    )
    log, evaluations, seconds, cpu_seconds = StepLog(run.log_every), [], 0.0, 0.0
    for number, batch in enumerate(islice(suite.batches(cell.task, run.batch_size), run.steps), 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        log.add(method.step(batch))
        seconds += time.perf_counter() - start
        cpu_seconds += time.process_time() - cpu_start
        if number % run.evaluate_every == 0 or number == run.steps:
            with method.deployed():
                figures = suite.evaluate(model, cell.task)
            evaluations.append({"step": number} | _rounded(figures))
    transcripts = suite.transcripts()
    save_transcripts(cell, transcripts, folder)
    return {
        "aligned": _rounded(aligned),
        "final": evaluations[-1],
        "evaluations": evaluations,
        "refused": {k: "".join("01"[r] for r in v) for k, v in suite.refused().items()},
        "transcripts_sha256": sha256_of(transcripts) if transcripts else None,
        "log": log.facts(),
        "anchors": len(anchors),
        "rows": asdict(method.spent),
        "train_seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "peak_memory_mb": peak_memory_mb(),
    }


class StepLog:
    """Means of every step fact over windows of ``every`` steps."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._window: dict[str, list[float]] = {}
        self._means: dict[str, list[float]] = {}
        self._steps = 0

    def add(self, facts: Mapping[str, float]) -> None:
        """Take in one step's facts."""
        for name, value in facts.items():
            self._window.setdefault(name, []).append(value)
        self._steps += 1
        if self._steps % self._every == 0:
            self._close()

    def _close(self) -> None:
        for name, values in self._window.items():
            self._means.setdefault(name, []).append(float(f"{fmean(values):.4g}"))
        self._window = {}

    def facts(self) -> dict[str, Any]:
        """``{"every": n, name: [mean of window 1, ...]}``."""
        if self._window:
            self._close()
        return {"every": self._every} | self._means


def _earlier(cell: Cell, folder: Path) -> Earlier:
    def read(method: str, variant: str) -> Mapping[str, Any]:
        other = replace(cell, method=method, variant=variant)
        facts = load(other, folder)
        if facts is None:
            raise FileNotFoundError(
                f"{cell.method}/{cell.variant} needs the result of {method}/{variant} for task "
                f"{cell.task}, seed {cell.seed}; run that first"
            )
        return facts

    return read


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in metrics.items()}
