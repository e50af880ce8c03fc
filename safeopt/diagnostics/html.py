"""report.html: one file that opens offline, in light and dark, on a phone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from safeopt.diagnostics import figures
from safeopt.diagnostics.report import cheap_rows, condition_rows


def as_html(document: Mapping[str, Any]) -> str:
    """The page of a report's document.

    Args:
        document: what `as_dict` gives, with any further fields as provenance; ``rows`` are the
            texts of the scored rows.
    """
    loader = PackageLoader("safeopt.diagnostics", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    shown = (
        "curve", "condition", "onset", "rows", "suggestions", "verdict", "reason", "cheap", "power",
        "pilots", "guarded",
    )  # fmt: skip
    facts = {
        key.replace("_", " "): _plain(value)
        for key, value in document.items()
        if key not in shown and value is not None
    }
    return environment.get_template("report.html.j2").render(
        document=document,
        pictures=_pictures(document),
        condition=condition_rows(document),
        worst=worst_rows(document),
        cheap=cheap_rows(document),
        facts=facts,
    )


def _plain(value: Any) -> str:
    """A fact in words; what is None or empty in a mapping is left out."""
    if isinstance(value, Mapping):
        named = {key: _plain(one) for key, one in value.items() if one is not None}
        return ", ".join(f"{key} {text}" for key, text in named.items() if text)
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pictures(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [("Forecast", figures.forecast_figure(document))]
    if "condition" in document:
        found.append(("Spectrum of the safety Fisher", figures.spectrum_figure(document)))
    if "onset" in document:
        found.append(("Onset of the drift", figures.onset_figure(document)))
    if "condition" in document:
        found.append(("Where it happens", figures.heat_figure(document)))
    return [(title, picture) for title, picture in found if picture]


def worst_rows(document: Mapping[str, Any], count: int = 5) -> list[tuple[float, str]]:
    """Score and text of the rows that raise the anchors' losses most, worst first."""
    scores = document.get("condition", {}).get("row_scores", [])
    texts = document.get("rows", [""] * len(scores))
    return sorted(zip(scores, texts, strict=True), reverse=True)[:count]
