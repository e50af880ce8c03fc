"""A diagnosis as one JSON document, and as markdown for a pull request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from safeopt.diagnostics.cheap import NAMES
from safeopt.diagnostics.condition import Condition
from safeopt.diagnostics.evaluated import FORECAST, Comparison, suites
from safeopt.diagnostics.forecast import Forecast
from safeopt.diagnostics.lookahead import Estimate
from safeopt.diagnostics.pilot import Pilot, PlannedRun
from safeopt.diagnostics.suggestions import GuardedPilot, suggestions

SCHEMA = 4


def as_dict(
    forecast: Forecast,
    planned: PlannedRun | None = None,
    pilots: Sequence[Pilot] = (),
    condition: Condition | None = None,
    guarded: GuardedPilot | None = None,
    comparison: Comparison | None = None,
) -> dict[str, Any]:
    """A JSON document; ``schema`` changes when its fields do.

    Args:
        forecast: the forecast.
        planned: the run, for accumulated learning rates and suggestions.
        pilots: what the forecast was made of, for the exponent of the onset.
        condition: the Alignment Instability Condition.
        guarded: what a guard would make of the run.
        comparison: the run's cheap predictors, which the forecast's verdict has been weighed with.
    """
    curve = {
        name: _rounded(getattr(forecast, name))
        for name in ("effective_steps", "anchor_loss", "lost", "low", "high")
    }
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "verdict": forecast.verdict.value,
        "reason": forecast.reason,
        "tolerance": forecast.tolerance,
        "first_step_over": forecast.first_step_over(),
        "power": _estimate(forecast.power),
        "curve": curve,
    }
    if planned is not None:
        rates = forecast.effective_steps * planned.learning_rate
        curve["accumulated_rate"] = _rounded(rates)
        scores = () if condition is None else condition.row_scores
        document["suggestions"] = suggestions(forecast, planned, guarded, scores)
    if guarded is not None:
        document["guarded"] = _guarded(guarded)
    if pilots:
        document["onset"] = onset(pilots)
        document["pilots"] = [_pilot(pilot) for pilot in pilots]
    if comparison is not None:
        document["cheap"] = _cheap(comparison, float(forecast.lost[-1]))
    if condition is not None:
        document["condition"] = _condition(condition)
    return document


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{float(value):.6g}") for value in values]


def onset(pilots: Sequence[Pilot], resamples: int = 500) -> dict[str, Any]:
    """The exponent of the drift's onset, 1/2 mean_i (l_i(t) - l_i(0))^2 ~ t^p, by pilots.

    p is 2 where the first step already moves the anchors and 4 where curvature has to bend the way
    into them first. The interval is a bootstrap over anchors.
    """
    steps = pilots[0].effective_steps
    losses = torch.stack([pilot.losses.double() for pilot in pilots]).mean(0)
    squares = 0.5 * (losses[1:] - losses[0]).square()  # (R - 1, N)
    drift = squares.mean(1)
    generator = torch.Generator().manual_seed(0)
    anchors = squares.shape[1]
    found = []
    for _ in range(resamples):
        pick = torch.randint(anchors, (anchors,), generator=generator)
        found.append(_slope(steps[1:], squares[:, pick].mean(1)))
    low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {
        "effective_steps": _rounded(steps[1:]),
        "drift": _rounded(drift),
        "exponent": round(_slope(steps[1:], drift), 3),
        "low": round(low, 3),
        "high": round(high, 3),
    }


def _slope(x: Tensor, y: Tensor) -> float:
    a, b = x.double().log(), y.clamp(min=1e-30).log()
    if len(a) < 2:
        return math.nan
    a = a - a.mean()
    return float((a * (b - b.mean())).sum() / a.square().sum())


def _estimate(estimate: Estimate) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in asdict(estimate).items()}


def _guarded(guarded: GuardedPilot) -> dict[str, Any]:
    lost = guarded.lost()
    low, high = lost.interval()
    return {
        "optimizer": guarded.optimizer,
        "budget": guarded.budget,
        "steps": len(guarded.pilot.task_losses),
        "anchors": lost.total,
        "lost": round(lost.value, 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def _pilot(pilot: Pilot) -> dict[str, Any]:
    kept = pilot.kept[:, pilot.kept[0]].double()
    return {
        "factor": round(pilot.compression, 3),
        "steps": len(pilot.task_losses),
        "lost": round(1 - float(kept[-1].mean()), 4),
        "anchor_loss": float(f"{float(pilot.losses[-1].mean()):.6g}"),
    }


def _cheap(comparison: Comparison, lost: float) -> dict[str, Any]:
    """Every predictor's value of this run and what it was worth, and which the verdict uses."""
    values = {FORECAST: lost, **comparison.values}
    ranks = {
        key: {suite.name: asdict(suite.worth[key].rank) for suite in suites()} for key in values
    }
    names = {FORECAST: "forecast share of anchors lost", **NAMES}
    return {
        "nearest": comparison.suite.name,
        "used": comparison.used,
        "says": comparison.says(),
        "predictors": [
            {
                "key": key,
                "name": names[key],
                "value": None if math.isnan(value) else float(f"{value:.4g}"),
                "rank_correlation": ranks[key],
            }
            for key, value in values.items()
        ],
        "words": comparison.told,
    }


def _condition(condition: Condition) -> dict[str, Any]:
    return {
        "spectrum": _rounded(condition.spectrum),
        "null_spectrum": _rounded(condition.null_spectrum),
        "tail": round(condition.tail, 4),
        "null_tail": round(condition.null_tail, 4),
        "rank": condition.rank,
        "overlap": _estimate(condition.overlap),
        "expected_overlap": float(f"{condition.expected_overlap:.6g}"),
        "velocity": _estimate(condition.velocity),
        "coupling": _estimate(condition.coupling),
        "acceleration": _estimate(condition.acceleration),
        "law_window": round(condition.law.window(), 1),
        "hessian_error": float(f"{condition.hessian_error:.3g}"),
        "modules": [asdict(module) for module in condition.modules],
        "row_scores": [float(f"{score:.4g}") for score in condition.row_scores],
    }


def as_markdown(document: Mapping[str, Any]) -> str:
    """Verdict, reason, the curve as a table and what to do."""
    curve = document["curve"]
    lines = [
        f"## {document['verdict']}",
        "",
        f"{document['reason']}.",
        "",
        "| effective steps | anchor loss (nats) | anchors lost | 95 % interval |",
        "| ---: | ---: | ---: | ---: |",
    ]
    columns = ("effective_steps", "anchor_loss", "lost", "low", "high")
    for steps, loss, lost, low, high in zip(*(curve[c] for c in columns), strict=True):
        interval = f"{100 * low:.0f} to {100 * high:.0f} %"
        lines.append(f"| {steps:.0f} | {loss:.3f} | {100 * lost:.0f} % | {interval} |")
    lines += ["", *(f"- {advice}" for advice in document.get("suggestions", ()))]
    for name, value, low, high in condition_rows(document):
        lines.append(f"- {name}: {value}" + (f" ({low} to {high})" if low else ""))
    lines += _cheap_lines(document)
    return "\n".join(lines).rstrip() + "\n"


def _cheap_lines(document: Mapping[str, Any]) -> list[str]:
    head, rows = cheap_rows(document)
    if not rows:
        return []
    lines = ["", document["cheap"]["words"]]
    lines += ["Below, rank correlations with the share of refusals lost, by model evaluated.", ""]
    lines += ["| " + " | ".join(head) + " |"]
    lines.append("| --- |" + " ---: |" * (len(head) - 1))
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def cheap_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the predictors' table, ready to print."""
    found = document.get("cheap", {"predictors": []})["predictors"]
    names = list(found[0]["rank_correlation"]) if found else []
    rows = [
        [
            predictor["name"],
            _value(predictor["key"], predictor["value"]),
            *(f"{predictor['rank_correlation'][name]['value']:.2f}" for name in names),
        ]
        for predictor in found
    ]
    return ["predictor", "this run", *names], rows


def _value(key: str, value: float | None) -> str:
    if value is None:
        return "not read"
    return f"{100 * value:.0f} %" if key == FORECAST else f"{value:.2g}"


def condition_rows(document: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, value and interval of the condition's figures, ready to print."""
    found = document.get("condition")
    if found is None:
        return []
    rows = [
        ("Spectrum's mass beyond its first tenth", f"{found['tail']:.2f}", "", ""),
        ("... of harmless rows", f"{found['null_tail']:.2f}", "", ""),
    ]
    for key, name in (
        ("overlap", "Overlap ε of the first step with the safety subspace"),
        ("velocity", "First-order change of the anchor loss in a step (nats)"),
        ("coupling", "Coupling γ through the task's curvature (nats a step²)"),
        ("acceleration", "Whole acceleration Γ, by look-ahead (nats a step²)"),
    ):
        value, low, high = (f"{found[key][end]:.2g}" for end in ("value", "low", "high"))
        rows.append((name, value, low, high))
    rows.append(("Overlap that a random step has", f"{found['expected_overlap']:.2g}", "", ""))
    rows.append(("Planned steps within which Γ's law holds", f"{found['law_window']:.0f}", "", ""))
    return rows
