"""A forecast as JSON and as markdown for a pull request."""

from __future__ import annotations

from typing import Any

from safeopt.diagnostics.forecast import Forecast

SCHEMA = 1


def as_dict(forecast: Forecast) -> dict[str, Any]:
    """A JSON document of the forecast; ``schema`` changes when its fields do."""
    curve = {
        name: [round(float(value), 6) for value in getattr(forecast, name)]
        for name in ("effective_steps", "anchor_loss", "lost", "low", "high")
    }
    return {
        "schema": SCHEMA,
        "verdict": forecast.verdict.value,
        "reason": forecast.reason,
        "tolerance": forecast.tolerance,
        "first_step_over": forecast.first_step_over(),
        "curve": curve,
    }


def as_markdown(forecast: Forecast) -> str:
    """Verdict, reason and the curve as a table."""
    lines = [
        f"## {forecast.verdict.value}",
        "",
        f"{forecast.reason}.",
        "",
        "| effective steps | anchor loss (nats) | anchors lost | 95 % interval |",
        "| ---: | ---: | ---: | ---: |",
    ]
    rows = zip(
        forecast.effective_steps.tolist(),
        forecast.anchor_loss.tolist(),
        forecast.lost.tolist(),
        forecast.low.tolist(),
        forecast.high.tolist(),
        strict=True,
    )
    for steps, loss, lost, low, high in rows:
        interval = f"{100 * low:.0f} to {100 * high:.0f} %"
        lines.append(f"| {steps:.0f} | {loss:.3f} | {100 * lost:.0f} % | {interval} |")
    return "\n".join(lines) + "\n"
