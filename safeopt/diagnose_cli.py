"""The command ``safeopt diagnose``: what a planned training run will do to the anchors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

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
    parser.add_argument("--pilots", type=int, default=2, help="pilot runs (default: 2)")
    parser.add_argument("--pilot-steps", type=int, default=32, help="steps of each (default: 32)")
    parser.add_argument(
        "--opening", type=int, default=4, help="reply tokens that tell a refusal (default: 4)"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="share of anchors to lose (default: 0.1)"
    )
    parser.add_argument("--report", type=Path, help="folder for report.json and report.md")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_run, training_options=[])


def _run(arguments: argparse.Namespace) -> int:
    from safeopt.diagnostics import as_dict, as_markdown
    from safeopt.environment import environment
    from safeopt.files import write_json, write_text
    from safeopt.training.config import parse_args
    from safeopt.training.diagnose import diagnose

    config = parse_args([*_options(arguments), "--output_dir", "."], "safeopt diagnose")
    found = diagnose(
        config,
        anchors=arguments.anchors,
        pilots=arguments.pilots,
        pilot_steps=arguments.pilot_steps,
        opening=arguments.opening,
        tolerance=arguments.tolerance,
    )
    facts = as_dict(found.forecast) | {"run": config.to_dict(), **found.facts(), **environment()}
    text = as_markdown(found.forecast)
    if arguments.report is not None:
        arguments.report.mkdir(parents=True, exist_ok=True)
        write_json(arguments.report / "report.json", facts)
        write_text(arguments.report / "report.md", text)
    print(json.dumps(facts, indent=1) if arguments.json else text)
    return found.forecast.verdict.exit_code


def _options(arguments: argparse.Namespace) -> list[str]:
    options = list(arguments.training_options)
    for short, name in SHORT.items():
        value = getattr(arguments, short)
        if value is not None:
            options += [f"--{name}", value]
    return options
