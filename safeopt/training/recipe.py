"""What every recipe script does around `train`: parse, report, exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from safeopt.training import data
from safeopt.training.config import TrainConfig, parse_args
from safeopt.training.loop import train

RowCheck = Callable[[Sequence[data.Row]], None]


def run_recipe(argv: Sequence[str], description: str, check: RowCheck | None = None) -> int:
    """Train as flags and ``--config`` say.

    Args:
        argv: Command line without the program's name.
        description: First line of ``--help``.
        check: Raises `ValueError` when the rows do not suit the recipe.

    Returns:
        0 on success, 2 after printing one sentence on what went wrong.
    """
    try:
        config = parse_args(argv, description)
        _check_rows(config, check)
        result = train(config)
    except (ValueError, RuntimeError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if PartialState().is_main_process:
        where = Path(config.output_dir)
        print(f"{result.steps} steps, loss {result.loss:.3f}; everything is in {where}")
    return 0


def _check_rows(config: TrainConfig, check: RowCheck | None) -> None:
    if check is not None and config.dataset is not None:
        rows: list[dict[str, Any]] = data.read_rows(config.dataset)
        check(rows)
