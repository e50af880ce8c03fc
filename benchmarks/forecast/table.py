"""Write the forecast's table and picture: ``python -m benchmarks.forecast.table``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.forecast.score import (
    BREAKS,
    PREDICTORS,
    forecast_of,
    roc_area,
    score,
    slope,
    spearman,
)
from benchmarks.forecast.worlds import RESULTS
from benchmarks.markdown import fill
from safeopt.files import read_jsonl, write_text

README = Path(__file__).parent / "README.md"
PICTURE = Path(__file__).parent / "world.png"
SEEN = (3, 4)
Rows = Sequence[Mapping[str, Any]]


def predictors_table(rows: Rows) -> str:
    """Every predictor against the share of refusals that was lost."""
    groups = {"all": rows} | {
        mode: [row for row in rows if row["mode"] == mode] for mode in ("full", "lora")
    }
    head = ["predictor", *(f"{name}: rank correlation" for name in groups), "ROC area"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, predict in PREDICTORS.items():
        cells = [
            str(score(spearman, [predict(r) for r in group], actual(group)))
            for group in groups.values()
        ]
        cells.append(str(score(roc_area, [predict(r) for r in rows], actual(rows))))
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def verdict_table(rows: Rows) -> str:
    """Verdicts against outcomes."""
    lines = [
        f"| verdict | runs | lost more than {100 * BREAKS:.0f} % | largest loss |",
        "| --- " * 4 + "|",
    ]
    pairs = [(forecast_of(row).verdict.value, row) for row in rows]
    for verdict in sorted({verdict for verdict, _ in pairs}):
        losses = actual([row for found, row in pairs if found == verdict])
        broken = sum(loss > BREAKS for loss in losses)
        lines.append(f"| {verdict} | {len(losses)} | {broken} | {max(losses):.2f} |")
    return "\n".join(lines)


def verdicts(rows: Rows) -> str:
    """Verdicts where the interval was designed, and where it was not; calibration of all."""
    seen = [row for row in rows if row["seed"] in SEEN]
    fresh = [row for row in rows if row["seed"] not in SEEN]
    calibration = score(slope, [float(forecast_of(row).lost[-1]) for row in rows], actual(rows))
    names = " and ".join(map(str, SEEN))
    return (
        f"Seeds {names}, after which the interval was made to hold what sampling loses:\n\n"
        f"{verdict_table(seen)}\n\nThe seed after that:\n\n{verdict_table(fresh)}\n\n"
        f"Calibration slope (actual on forecast): {calibration}."
    )


def rival() -> str:
    """Scores beside alignment-risk, as `side_by_side` left them."""
    found = json.loads((RESULTS.parent / "side_by_side.json").read_text(encoding="utf-8"))
    scores = found["scores"]
    called = scores["alignment_risk_verdicts"]
    lines = ["| forecast | rank correlation | ROC area |", "| --- | --- | --- |"]
    for name, key in (("safeopt", "safeopt"), ("alignment-risk", "alignment_risk_loss")):
        lines.append(f"| {name} | {scores[key]['spearman']} | {scores[key]['roc_area']} |")
    largest = max(run["alignment_risk_loss"] for run in found["runs"])
    return "\n".join(lines) + (
        f"\n\nOf {scores['runs']} runs {scores['broken']} broke; alignment-risk foresaw a collapse "
        f"in {called['collapse']}: its largest forecast is a loss of {largest:.2g}, its threshold "
        "0.1."
    )


def machine(rows: Rows) -> str:
    """Where and when."""
    first, dates = rows[0], sorted({row["date"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    ratio = sorted(row["predict_seconds"] / row["run_seconds"] for row in rows)[len(rows) // 2]
    return (
        f"{len(rows)} runs, seeds {', '.join(map(str, seeds))}, {dates[0][:10]} to "
        f"{dates[-1][:10]}, {first['processor']}, torch {first['versions']['torch']}. All "
        f"predictors of a run together took {ratio:.2f} of the run's own time (median)."
    )


def actual(rows: Rows) -> list[float]:
    """Share of the refusals that each run lost."""
    return [float(row["actual"]["lost"]) for row in rows]


def draw(rows: Rows, path: Path) -> None:
    """Forecast against outcome, one mark a run."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4.4), layout="constrained")
    for mode, marker in (("full", "o"), ("lora", "^")):
        chosen = [row for row in rows if row["mode"] == mode]
        made = [forecast_of(row) for row in chosen]
        x, y = [float(forecast.lost[-1]) for forecast in made], actual(chosen)
        error = [
            [float(forecast.lost[-1] - forecast.low[-1]) for forecast in made],
            [float(forecast.high[-1] - forecast.lost[-1]) for forecast in made],
        ]
        axes.errorbar(x, y, xerr=error, fmt=marker, alpha=0.6, linewidth=0.8, label=mode)
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=0.8)
    axes.set_xlabel("forecast share of anchors lost")
    axes.set_ylabel("share of held-out refusals lost")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Fill the README and draw the picture."""
    rows = [row for _, row in read_jsonl(RESULTS)]
    parts = {
        "predictors": predictors_table(rows),
        "verdicts": verdicts(rows),
        "machine": machine(rows),
        "rival": rival(),
    }
    write_text(README, fill(README.read_text(encoding="utf-8"), parts))
    draw(rows, PICTURE)


if __name__ == "__main__":
    main()
