"""The half of `side_by_side` that runs beside ``alignment-risk``: nothing of ours is imported.

Their defaults, but for the threads, the learning rate and the number of steps of each run.
"""

from __future__ import annotations

import json
import sys
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
    import alignment_risk  # type: ignore[import-not-found, unused-ignore]

    model = AutoModelForCausalLM.from_pretrained(place / "model", attn_implementation="eager")
    given = torch.load(place / "given.pt")
    anchors, runs = given["anchors"], []
    rows = [{k: v[i : i + 1] for k, v in anchors.items()} for i in range(len(anchors["labels"]))]
    for plan in json.loads((place / "plans.json").read_text(encoding="utf-8")):
        config = alignment_risk.PipelineConfig(
            learning_rate=plan["lr"],
            forecast=alignment_risk.ForecastConfig(max_steps=round(plan["effective_steps"])),
            curvature=alignment_risk.CurvatureConfig(max_batches=BATCHES),
        )
        pipeline = alignment_risk.AlignmentRiskPipeline(config)
        report = pipeline.run(model, rows, loss, given["batches"], loss)
        runs.append(
            plan
            | {
                "loss": float(report.forecast.estimated_loss[-1]),
                "collapses": report.forecast.collapse_step is not None,
                "overlap": float(report.initial_risk.projected_ratio),
                "warning": report.warning,
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
