"""Beside ``alignment-risk``: the same model, anchors and task batches, both forecasts, the outcome.

``alignment-risk`` wants an older torch, so it runs in an environment of its own::

    python -m benchmarks.forecast.side_by_side export FOLDER
    python3 -m venv OTHER && OTHER/bin/pip install alignment-risk==1.14.1 transformers
    OTHER/bin/python benchmarks/forecast/alignment_risk_run.py FOLDER
    python -m benchmarks.forecast.side_by_side compare FOLDER

It looks at runs of all weights in ``results/world.jsonl``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.collapse.world import World
from benchmarks.forecast.planned import refusals
from benchmarks.forecast.score import BREAKS, roc_area, score, spearman
from benchmarks.forecast.worlds import ANCHORS, RESULTS, SEEDS
from safeopt.environment import environment
from safeopt.files import read_jsonl, write_json

COMPARED = Path(__file__).parent / "results" / "side_by_side.json"
BATCHES = 4


def export(folder: Path) -> None:
    """Write models, anchors and batches that any torch reads."""
    rows = _runs()
    for seed, task in sorted({(row["seed"], row["task"]) for row in rows}):
        world, place = World(seed), folder / f"{seed}-{task}"
        model: Any = world.model()
        model.save_pretrained(place / "model")
        anchors = refusals(world.anchors(task), ANCHORS).batch()
        drawn = world.batches(task, world.settings.batch_size)
        given = {
            "anchors": {
                "input_ids": anchors.input_ids,
                "attention_mask": anchors.attention_mask,
                "labels": anchors.labels,
            },
            "batches": [next(drawn) for _ in range(BATCHES)],
        }
        torch.save(given, place / "given.pt")
        own = [row for row in rows if (row["seed"], row["task"]) == (seed, task)]
        plans = [{key: row[key] for key in ("lr", "steps", "effective_steps")} for row in own]
        write_json(place / "plans.json", plans)


def compare(folder: Path) -> None:
    """Put its forecasts beside the outcomes; `table` adds safeopt's of the same runs."""
    found = []
    for row in _runs():
        place = folder / f"{row['seed']}-{row['task']}"
        theirs = json.loads((place / "alignment_risk.json").read_text(encoding="utf-8"))
        (run,) = [r for r in theirs["runs"] if (r["lr"], r["steps"]) == (row["lr"], row["steps"])]
        kept = {key: row[key] for key in ("seed", "task", "lr", "steps")}
        found.append(
            kept
            | {"lost": row["actual"]["lost"]}
            | {"alignment_risk_loss": run["loss"], "alignment_risk_collapses": run["collapses"]}
        )
    versions = theirs["versions"]
    facts = {"alignment_risk": versions, **environment()}
    write_json(COMPARED, facts | {"scores": _scores(found), "runs": found})
    print(json.dumps(_scores(found), indent=1))


def _runs() -> list[dict[str, Any]]:
    rows = [row for _, row in read_jsonl(RESULTS)]
    return [row for row in rows if row["mode"] == "full" and row["seed"] in SEEDS]


def _scores(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    actual = [row["lost"] for row in found]
    scores: dict[str, Any] = {"runs": len(found), "broken": sum(a > BREAKS for a in actual)}
    predicted = [row["alignment_risk_loss"] for row in found]
    scores["alignment_risk_loss"] = {
        "spearman": str(score(spearman, predicted, actual)),
        "roc_area": str(score(roc_area, predicted, actual)),
    }
    scores["alignment_risk_verdicts"] = {
        "collapse": sum(row["alignment_risk_collapses"] for row in found),
        "collapse_and_broken": sum(
            row["alignment_risk_collapses"] and row["lost"] > BREAKS for row in found
        ),
    }
    return scores


def main() -> None:
    """One of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("export", "compare"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    (export if arguments.part == "export" else compare)(arguments.folder)


if __name__ == "__main__":
    main()
