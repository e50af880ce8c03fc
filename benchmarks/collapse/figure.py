"""The picture of the Pareto curves: ``python -m benchmarks.collapse.figure --suite world``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.collapse.curves import Curve, curves
from benchmarks.collapse.results import FOLDER, load_all
from benchmarks.collapse.variants import read_plan

PICTURES = Path(__file__).parent / "figures"
LOUD = {"safe": "#b5122a", "mixed": "#1f5fa8", "adamw": "#000000"}
_MARKERS = "ovs^D<>pP*Xh"


def draw(found: Sequence[Curve], path: Path) -> None:
    """Draw one panel a task: every setting a mark, each method's front a line."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = found[0].tasks
    size = (5.2 * len(tasks) + 2.4, 4.6)
    figure, panels = plt.subplots(1, len(tasks), figsize=size, layout="constrained", squeeze=False)
    for number, (task, axes) in enumerate(zip(tasks, panels[0], strict=True)):
        _panel(axes, found, number)
        axes.set_title(task, loc="left")
    panels[0][0].set_ylabel("held-out harmful prompts refused, share")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axes: Any, found: Sequence[Curve], task: int) -> None:
    quiet = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    order = ["", *reversed(LOUD)]  # ours last, so on top
    ranked = sorted(found, key=lambda c: order.index(c.method if c.method in LOUD else ""))
    for number, curve in enumerate(ranked):
        x, y = _task(curve)[:, task], 1 - curve.asr.rates.mean(-1)[:, task]
        loud = curve.method in LOUD
        style = {
            "color": LOUD.get(curve.method, quiet[number % len(quiet)]),
            "marker": _MARKERS[number % len(_MARKERS)],
            "linewidth": 2.2 if loud else 0.9,
            "markersize": 6 if loud else 4,
        }
        axes.plot(*front(x, y), drawstyle="steps-pre", label=curve.label, **style)
        axes.plot(x, y, alpha=0.5, **(style | {"linestyle": "none"}))
    if found[0].nll is None:
        axes.set_xlabel("task, share")
        axes.set_xlim(-0.03, 1.03)
    else:  # as it is: the score is cut where a method learns more than AdamW
        axes.set_xlabel("held-out task NLL, nats a token, falling")
        axes.xaxis.set_major_formatter(lambda value, _: f"{-value:g}")
    axes.set_ylim(-0.03, 1.03)
    axes.grid(color="#e8e8e8", linewidth=0.8)


def _task(curve: Curve) -> Any:
    """What lies on the x-axis, more of it to the right."""
    return curve.task.mean(-1) if curve.nll is None else -curve.nll.mean(-1)


def front(x: Any, y: Any) -> tuple[Any, Any]:
    """The points that no other point beats on both axes, ordered by x."""
    order = np.lexsort((y, x))[::-1]
    best = np.maximum.accumulate(np.concatenate([[-np.inf], y[order][:-1]]))
    kept = order[y[order] > best][::-1]
    return x[kept], y[kept]


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the curves of a suite's committed results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="world")
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--output", type=Path, help="figures/<suite>.png by default")
    chosen = parser.parse_args(arguments)
    plan = read_plan(chosen.suite)
    found = curves(plan, list(load_all(chosen.suite, chosen.results, without=plan.apart)))
    if not found:
        command = f"python -m benchmarks.collapse.run --suite {chosen.suite} --sweep"
        raise SystemExit(f"no curve yet: {command}")
    draw(found, chosen.output or PICTURES / f"{chosen.suite}.png")


if __name__ == "__main__":
    main()
