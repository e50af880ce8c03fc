"""The demo's table and picture, made from the result files of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeopt.demo.plan import ADVBENCH, OVERREFUSAL, STRONGREJECT, TASK, Method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

Results = Mapping[Method, Mapping[str, Any]]
LABELS: Mapping[Method, str] = {
    "aligned": "aligned model",
    "adamw": "AdamW",
    "safe_adamw": "SafeAdamW",
}
COLOURS: Mapping[Method, str] = {"aligned": "#666666", "adamw": "#c44e1b", "safe_adamw": "#1b6ec4"}


def table(results: Results) -> Table:
    """One row a model; rates carry their Wilson 95 % interval."""
    from rich import box
    from rich.table import Table

    # No vertical lines: the table fits the 80 columns of a terminal or a log.
    title = "Refusals before and after fine-tuning on harmless maths problems"
    made = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column("model", no_wrap=True)
    for heading in (
        "AdvBench\nrefused",
        "StrongREJECT\nrefused",
        "harmless\nrefused",
        "task NLL\n(nats)",
        "training\n(s)",
        "memory\n(GB)",
    ):
        made.add_column(heading, justify="right", no_wrap=True)
    for method, result in results.items():
        made.add_row(LABELS[method], *_cells(result))
    made.caption = (
        "harmless refused = over-refusal; (low-high) = 95 % Wilson interval; held-out prompts"
    )
    return made


def _cells(result: Mapping[str, Any]) -> list[str]:
    rates = [_rate(result["refusals"][name]) for name in (ADVBENCH, STRONGREJECT, OVERREFUSAL)]
    cost = ["-", "-"]
    if "train_seconds" in result:
        cost = [f"{result['train_seconds']:.0f}", f"{result['peak_memory_mb'] / 1024:.1f}"]
    return [*rates, f"{result['nll'][TASK]:.3f}", *cost]


def _rate(rate: Mapping[str, Any]) -> str:
    low, high = rate["interval_95"]
    return f"{100 * rate['rate']:.0f} %\n({100 * low:.0f}-{100 * high:.0f})"


def picture(results: Results, path: Path) -> None:
    """Refusal rate and task loss against steps, one line an optimizer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        _curves(left, results, "refusal_rate", scale=100)
        left.set_ylim(-3, 105)
        left.set_title("held-out harmful requests refused, %", loc="left", fontsize=11)
        _curves(right, results, "task_nll")
        right.set_title("held-out maths task loss, nats per token", loc="left", fontsize=11)
        partial = path.with_name(f".{path.name}")
        figure.savefig(partial, dpi=160, format="png")
        plt.close(figure)
    partial.replace(path)


def _curves(axes: Axes, results: Results, figure: str, scale: float = 1.0) -> None:
    ends = {}
    for method, result in results.items():
        if "curve" not in result:
            continue
        steps = [point["step"] for point in result["curve"]]
        values = [scale * point[figure] for point in result["curve"]]
        # AdamW is drawn first and wider, so that it shows where both lines coincide.
        width = 3.2 if method == "adamw" else 1.8
        axes.plot(steps, values, color=COLOURS[method], linewidth=width)
        ends[method] = (steps[-1], values[-1])
    axes.margins(y=0.1)
    low, high = axes.get_ylim()
    for method, offset in _label_offsets({m: y for m, (_, y) in ends.items()}, high - low).items():
        axes.annotate(
            LABELS[method],
            ends[method],
            xytext=(6, offset),
            textcoords="offset points",
            color=COLOURS[method],
            va="center",
            annotation_clip=False,
        )
    axes.set_xlabel("fine-tuning steps")
    axes.locator_params(axis="x", integer=True, nbins=6)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)


def _label_offsets(ends: Mapping[Method, float], span: float) -> dict[Method, float]:
    """Points by which end labels move apart when their lines end at the same height."""
    ordered = sorted(ends, key=lambda method: ends[method])
    close = len(ordered) == 2 and ends[ordered[1]] - ends[ordered[0]] < 0.08 * span
    shifts = (-7.0, 7.0) if close else (0.0, 0.0)
    return dict(zip(ordered, shifts, strict=False))
