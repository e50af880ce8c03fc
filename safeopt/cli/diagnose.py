"""The command ``safeopt diagnose``: what a planned training run will do to the anchors."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

SHORT = {"model": "model_name_or_path", "lr": "learning_rate", "steps": "max_steps"}
"""Short names of the options that every question has."""


def add_diagnose(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    parser.description = (
        "Forecast what a training run does to the anchors. Exit codes: 0 GO or CAUTION, 3 NO-GO, "
        "4 INCONCLUSIVE, 2 error."
    )
    parser.epilog = "Every other option is one of recipes/sft.py, and means the same here."
    for short, name in SHORT.items():
        parser.add_argument(f"--{short}", metavar="VALUE", help=f"the same as --{name}")
    parser.add_argument("--anchors", type=Path, help="JSONL file of anchors")
    parser.add_argument(
        "--pilot-steps",
        type=int,
        help="steps of each of the three pilots; more see further, and take longer (default: 10)",
    )
    parser.add_argument(
        "--forecast-only", action="store_true", help="leave the instability condition out"
    )
    parser.add_argument(
        "--opening",
        type=int,
        help="compare so many first tokens of the replies; by default greedy replies are judged",
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="share of anchors to lose (default: 0.1)"
    )
    parser.add_argument(
        "--report", type=Path, help="folder for report.html, report.json and report.md"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_run, training_options=[])


def _run(arguments: argparse.Namespace) -> int:
    from safeopt.diagnostics import as_markdown
    from safeopt.environment import environment
    from safeopt.training.config import parse_args
    from safeopt.training.diagnose import PILOT_STEPS, diagnose

    config = parse_args([*_options(arguments), "--output_dir", "."], "safeopt diagnose")
    if arguments.report is not None:
        _prepare(arguments.report)
    start = time.perf_counter()
    found = diagnose(
        config,
        anchors=arguments.anchors,
        pilot_steps=PILOT_STEPS if arguments.pilot_steps is None else arguments.pilot_steps,
        opening=arguments.opening,
        tolerance=arguments.tolerance,
        condition=not arguments.forecast_only,
    )
    seconds = {"seconds": round(time.perf_counter() - start, 1)}
    document = found.document() | {"run": config.to_dict(), **seconds, **environment()}
    if arguments.report is not None:
        _write(arguments.report, document)
    print(json.dumps(document, indent=1) if arguments.json else as_markdown(document))
    return found.forecast.verdict.exit_code


def _prepare(folder: Path) -> None:
    """Fail now rather than after minutes of measuring: no folder, or nothing to draw with."""
    importlib.import_module("safeopt.diagnostics.html")
    folder.mkdir(parents=True, exist_ok=True)


def _write(folder: Path, document: dict[str, Any]) -> None:
    from safeopt.diagnostics import as_markdown
    from safeopt.diagnostics.html import as_html
    from safeopt.files import write_json, write_text

    write_json(folder / "report.json", document)
    write_text(folder / "report.md", as_markdown(document))
    write_text(folder / "report.html", as_html(document))


def _options(arguments: argparse.Namespace) -> list[str]:
    options = list(arguments.training_options)
    for short, name in SHORT.items():
        value = getattr(arguments, short)
        if value is not None:
            options += [f"--{name}", value]
    return options
