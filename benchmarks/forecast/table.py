"""Write the forecast's tables and pictures: ``python -m benchmarks.forecast.table``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.forecast import cost, smols, worlds
from benchmarks.forecast.evaluated import write_evaluated
from benchmarks.forecast.score import (
    BREAKS,
    PREDICTORS,
    by_forecast,
    forecast_of,
    roc_area,
    score,
    slope,
    spearman,
)
from benchmarks.markdown import fill
from safeopt.files import read_jsonl, write_text

HERE = Path(__file__).parent
README = HERE / "README.md"
DESIGN = worlds.RESULTS.with_name("design.jsonl")
Rows = Sequence[Mapping[str, Any]]


def read(path: Path) -> Rows:
    """The runs of a results file."""
    return [row for _, row in read_jsonl(path)] if path.exists() else []


def predictors_table(rows: Rows) -> str:
    """Every predictor against the share of refusals that was lost."""
    groups = {"all": list(range(len(rows)))} | {
        mode: [i for i, row in enumerate(rows) if row["mode"] == mode] for mode in ("full", "lora")
    }
    groups, lost = {name: own for name, own in groups.items() if len(own) > 3}, actual(rows)
    head = ["predictor", *(f"{name}: rank correlation" for name in groups), "ROC area"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, predict in PREDICTORS.items():
        found = [predict(row) for row in rows]
        cells = [
            str(score(spearman, [found[i] for i in own], [lost[i] for i in own]))
            for own in groups.values()
        ]
        cells.append(str(score(roc_area, found, lost)))
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def verdict_table(rows: Rows) -> str:
    """Verdicts against outcomes, and calibration."""
    lines = [
        f"| verdict | runs | lost more than {100 * BREAKS:.0f} % | largest loss |",
        "| --- " * 4 + "|",
    ]
    pairs = [(forecast_of(row).verdict.value, row) for row in rows]
    for verdict in sorted({verdict for verdict, _ in pairs}):
        losses = actual([row for found, row in pairs if found == verdict])
        broken = sum(loss > BREAKS for loss in losses)
        lines.append(f"| {verdict} | {len(losses)} | {broken} | {max(losses):.2f} |")
    made = [forecast_of(row) for row in rows]
    calibration = score(slope, [float(m.lost[-1]) for m in made], actual(rows))
    held = sum(
        bool(m.low[-1] <= lost <= m.high[-1]) for m, lost in zip(made, actual(rows), strict=True)
    )
    return "\n".join(lines) + (
        f"\n\nCalibration slope (actual on forecast): {calibration}. The interval held the outcome "
        f"in {held} of {len(rows)} runs."
    )


def runs_table(rows: Rows) -> str:
    """Every run, one a line."""
    lines = [
        "| task | trains | learning rate | steps | forecast (interval) | verdict | lost |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in rows:
        made = forecast_of(row)
        share, low, high = (100 * float(x[-1]) for x in (made.lost, made.low, made.high))
        lost = 100 * row["actual"]["lost"]
        lines.append(
            f"| {row['task']} | {row['mode']} | {row['lr']:g} | {row['steps']} | {share:.0f} % "
            f"({low:.0f} to {high:.0f}) | {made.verdict.value} | {lost:.0f} % |"
        )
    return "\n".join(lines)


def smol_part(rows: Rows, fewest: int = 8) -> str:
    """The language model's runs; scores of fewer than ``fewest`` would say nothing."""
    scored = (predictors_table(rows), verdict_table(rows)) if len(rows) >= fewest else ()
    return "\n\n".join((*scored, runs_table(rows), machine(rows)))


def rival(world: Rows) -> str:
    """Scores beside alignment-risk's, as `side_by_side` left them, on the same runs."""
    found = json.loads((worlds.RESULTS.parent / "side_by_side.json").read_text(encoding="utf-8"))
    scores = found["scores"]
    called = scores["alignment_risk_verdicts"]
    same = {(run["seed"], run["task"], run["lr"], run["steps"]) for run in found["runs"]}
    rows = [
        row
        for row in world
        if row["mode"] == "full" and (row["seed"], row["task"], row["lr"], row["steps"]) in same
    ]
    own = [by_forecast(row) for row in rows]
    ours = [str(score(statistic, own, actual(rows))) for statistic in (spearman, roc_area)]
    theirs = scores["alignment_risk_loss"]
    lines = [
        "| forecast | rank correlation | ROC area |",
        "| --- | --- | --- |",
        f"| safeopt | {ours[0]} | {ours[1]} |",
        f"| alignment-risk | {theirs['spearman']} | {theirs['roc_area']} |",
    ]
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


def cost_table(timed: Mapping[str, Mapping[str, Any]]) -> str:
    """Seconds of `safeopt diagnose`, from start to end and of its parts."""
    stages = list(timed["full"]["stages"])
    head = ["trains", "seconds", *stages]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for mode, one in timed.items():
        cells = [one["seconds"], *(one["stages"][name] for name in stages)]
        lines.append(f"| {mode} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")
    one = timed["full"]
    return "\n".join(lines) + (
        f"\n\n{one['anchors']} anchors, {one['options']['steps']} steps of "
        f"{one['options']['per_device_train_batch_size']} rows of at most "
        f"{one['options']['max_length']} tokens, {one['pilot_steps']} pilot steps, "
        f"{one['torch_threads']} threads; {one['date'][:10]}, {one['processor']}, torch "
        f"{one['versions']['torch']}. One run each, on an otherwise idle machine."
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
    """Fill the README and the package's file of worths, and draw the picture."""
    world, smol, design = read(worlds.RESULTS), read(smols.RESULTS), read(DESIGN)
    parts = {
        "predictors": predictors_table(world),
        "verdicts": verdict_table(world),
        "machine": machine(world),
        "design": predictors_table(design),
        "rival": rival(world),
        "cost": cost_table(json.loads(cost.RESULT.read_text(encoding="utf-8"))),
    }
    if smol:
        parts["smol"] = smol_part(smol)
        write_evaluated(world, smol)
    write_text(README, fill(README.read_text(encoding="utf-8"), parts))
    draw(world, HERE / "world.png")


if __name__ == "__main__":
    main()
