"""Pictures of a diagnosis as SVG that takes the page's text colour, by matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

_INK = "#010203"  # stands for the page's text colour
_BLUE, _ORANGE, _GREY = "#2f7fd1", "#d9731a", "#8a8f98"  # readable on white and on near-black
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "safeopt",
    "font.size": 10,
    "font.family": "sans-serif",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
    ),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _svg(draw: Callable[[Figure], None], alt: str, size: tuple[float, float]) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub("<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(_INK, "currentColor")
    label = alt.replace("&", "and").replace('"', "'").replace("<", "less than ")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _single(draw: Callable[[Axes], None], alt: str) -> str:
    return _svg(lambda figure: draw(figure.add_subplot()), alt, (4.4, 3.0))


def forecast_figure(document: Mapping[str, Any]) -> str:
    """Anchors lost along the run, with the interval, and where the law of the first steps holds."""
    curve, tolerance = document["curve"], 100 * document["tolerance"]
    rate = "accumulated_rate" in curve
    x = curve["accumulated_rate"] if rate else curve["effective_steps"]
    lost, low, high = (100 * np.asarray(curve[name]) for name in ("lost", "low", "high"))

    def draw(axes: Axes) -> None:
        axes.fill_between(x, low, high, color=_BLUE, alpha=0.25, linewidth=0, label="95 % interval")
        axes.plot(x, lost, color=_BLUE, marker="o", markersize=4, label="expected")
        axes.axhline(tolerance, color=_ORANGE, linestyle="--", linewidth=1, label="tolerance")
        axes.set_xlim(0, x[-1])
        axes.set_ylim(-2, 102)
        axes.set_xlabel("accumulated learning rate" if rate else "effective steps")
        axes.set_ylabel("anchors lost (%)")
        if "condition" in document and rate:
            steps = curve["effective_steps"][-1]
            within = min(document["condition"]["law_window"] / steps, 1) * x[-1]
            axes.axvspan(0, within, color=_GREY, alpha=0.25, linewidth=0, label="window of the law")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8)

    alt = (
        f"Forecast: {lost[-1]:.0f} % of the anchors lost at the end, {low[-1]:.0f} to "
        f"{high[-1]:.0f} %; {tolerance:.0f} % may be."
    )
    return _single(draw, alt)


def spectrum_figure(document: Mapping[str, Any]) -> str:
    """Eigenvalues of the anchors' Fisher beside those of harmless rows."""
    found = document["condition"]

    def draw(axes: Axes) -> None:
        for key, name, color in (
            ("spectrum", "anchors", _BLUE),
            ("null_spectrum", "harmless rows", _GREY),
        ):
            values = np.asarray(found[key])
            values = values[values > 1e-8 * values.max()]
            axes.plot(1 + np.arange(len(values)), values, "o-", ms=3, color=color, label=name)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("eigenvalue")
        axes.set_ylabel("λ (nats² a unit²)")
        axes.legend(fontsize=8)

    alt = (
        f"Spectrum: {found['tail']:.2f} of the anchors' mass lies beyond the first tenth of the "
        f"eigenvalues, {found['null_tail']:.2f} of harmless rows'."
    )
    return _single(draw, alt)


def onset_figure(document: Mapping[str, Any]) -> str:
    """The pilots' drift on logarithmic axes, with the fitted exponent beside 2 and 4."""
    found = document["onset"]
    x, y = np.asarray(found["effective_steps"]), np.asarray(found["drift"]).clip(1e-30)

    def draw(axes: Axes) -> None:
        middle = math.exp(np.log(y).mean()), math.exp(np.log(x).mean())
        for power, style in ((2, ":"), (4, "--")):
            line = middle[0] * (x / middle[1]) ** power
            axes.plot(x, line, style, color=_GREY, label=f"exponent {power}")
        fitted = middle[0] * (x / middle[1]) ** found["exponent"]
        name = f"fit: {found['exponent']:.1f} ({found['low']:.1f} to {found['high']:.1f})"
        axes.plot(x, fitted, color=_ORANGE, label=name)
        axes.plot(x, y, "o", color=_BLUE, label="pilots")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([x[0], math.sqrt(x[0] * x[-1]), x[-1]])
        axes.xaxis.set_major_formatter("{x:.3g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("effective steps")
        axes.set_ylabel("drift (nats²)")
        axes.legend(fontsize=8)

    alt = (
        f"Onset: the drift grows with exponent {found['exponent']:.1f} ({found['low']:.1f} to "
        f"{found['high']:.1f}); theory has 2 with overlap, 4 without."
    )
    return _single(draw, alt)


def heat_figure(document: Mapping[str, Any]) -> str:
    """Share of the Fisher's trace, and of the first step's velocity, by layer and module."""
    modules = document["condition"]["modules"]
    kinds = list(dict.fromkeys(m["kind"] for m in modules if m["layer"] >= 0))
    layers = sorted({m["layer"] for m in modules if m["layer"] >= 0})
    if not layers:
        return ""

    def table(key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        grid = np.zeros((len(kinds), len(layers)))
        for m in modules:
            if m["layer"] >= 0:
                grid[kinds.index(m["kind"]), layers.index(m["layer"])] += 100 * m[key]
        return grid

    def draw(figure: Figure) -> None:
        shared = figure.subplots(2, 1, sharex=True)
        for axes, key, title in zip(
            shared, ("mass", "overlap"), ("Fisher mass (%)", "velocity (%)"), strict=True
        ):
            image = axes.imshow(table(key), aspect="auto", cmap="cividis", vmin=0)
            axes.set_title(title, fontsize=10)
            axes.set_xticks(range(0, len(layers), max(1, len(layers) // 6)))
            axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
            figure.colorbar(image, ax=axes)
        shared[-1].set_xlabel("layer")

    mass = table("mass")
    row, column = np.unravel_index(int(mass.argmax()), mass.shape)
    alt = (
        f"Heat map: {kinds[int(row)]} of layer {layers[int(column)]} holds most of the Fisher's "
        f"mass, {mass.max():.0f} %."
    )
    return _svg(draw, alt, (4.4, 1.2 + 0.4 * len(kinds)))
