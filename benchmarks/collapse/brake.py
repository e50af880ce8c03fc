"""What the trust region does on the way: violations, factor on the rate, refusals in mid-run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.collapse.variants import DEFAULT, SuitePlan

GROUP = "trust"
_DEFAULT = ("safe", DEFAULT)
_HEADS = (
    "",
    "violation, first half",
    "largest",
    "factor, first half",
    "factor",
    "ASR in mid-run",
    "runs",
)

Facts = Mapping[str, Any]


def brake_table(plan: SuitePlan, results: Sequence[Facts]) -> str:
    """The guard's default and the variants of the trust region: a row each, over all runs.

    Violations are nats above the budget, means over a refresh's anchors; they and the factor on
    the learning rate are logged in windows of steps. *First half* is the mean over its windows,
    *largest* the largest window of any run, *ASR in mid-run* of the evaluation before the last,
    if there is one.
    """
    chosen = [v for v in plan.variants if v.group == GROUP or (v.method, v.name) == _DEFAULT]
    own = [(v.label, [r for r in results if v.made(r) and "log" in r]) for v in chosen]
    rows = [_HEADS, ["---"] * len(_HEADS), *([label, *_row(runs)] for label, runs in own if runs)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(runs: Sequence[Facts]) -> Iterator[str]:
    violations = [r["log"]["safety/violation"] for r in runs]
    factors = [r["log"]["safety/brake"] for r in runs]
    early = [r["evaluations"][-2]["asr"] for r in runs if len(r["evaluations"]) > 1]
    yield f"{_first_half(violations):.2f}"
    yield f"{max(map(max, violations)):.1f}"
    yield f"{_first_half(factors):.2f}"
    yield f"{fmean(map(fmean, factors)):.2f}"
    yield f"{fmean(early):.3f} ({min(early):.2f} to {max(early):.2f})" if early else "-"
    yield str(len(runs))


def _first_half(series: Sequence[Sequence[float]]) -> float:
    return fmean(fmean(one[: len(one) // 2]) for one in series)
