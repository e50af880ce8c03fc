"""The half of `side_by_side` that runs beside ``alignment-risk``: nothing of ours is imported.

Their defaults, but for the threads, the learning rate and the number of steps of each run.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

BATCHES = 4


def loss(model: Any, batch: Any) -> Any:
    """Mean NLL of the labelled tokens."""
    return model(**batch).loss


def forecast(place: Path) -> list[dict[str, Any]]:
    """Their forecast of every planned run on one model."""
    alignment_risk: Any = import_module("alignment_risk")  # is not ours to require
    model = AutoModelForCausalLM.from_pretrained(place / "model", attn_implementation="eager")
    given = torch.load(place / "given.pt")
    anchors, runs = given["anchors"], []
    rows = [{k: v[i : i + 1] for k, v in anchors.items()} for i in range(len(anchors["labels"]))]
    config = alignment_risk.PipelineConfig(
        curvature=alignment_risk.CurvatureConfig(max_batches=BATCHES),
        adaptive_curvature_refine=False,
    )
    pipeline = alignment_risk.AlignmentRiskPipeline(config)
    report = pipeline.run(model, rows, loss, given["batches"], loss)
    for plan in json.loads((place / "plans.json").read_text(encoding="utf-8")):
        # The last part of `run`, which alone depends on the plan.
        config.learning_rate = plan["lr"]
        config.forecast.max_steps = round(plan["effective_steps"])
        found = pipeline._forecast_from_curvature(
            pipeline._stable_lambda_min(report.subspace), report.curvature
        )
        runs.append(
            plan
            | {
                "loss": float(found.estimated_loss[-1]),
                "collapses": found.collapse_step is not None,
            }
        )
    return runs


def main() -> None:
    """Every model in the folder."""
    torch.set_num_threads(1)
    versions = {name: version(name) for name in ("alignment-risk", "torch", "transformers")}
    for place in sorted(path.parent for path in Path(sys.argv[1]).glob("*/given.pt")):
        found: dict[str, Any] = {"versions": versions, "runs": forecast(place)}
        text = json.dumps(found, indent=1)
        (place / "alignment_risk.json").write_text(text, encoding="utf-8")
        print(place.name, [run["collapses"] for run in found["runs"]])


if __name__ == "__main__":
    main()
