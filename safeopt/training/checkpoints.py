"""Checkpoints and results that are on disk whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from safeopt.files import write_json

STATE_FILE = "trainer_state.json"
log = logging.getLogger(__name__)


def save_checkpoint(accelerator: Accelerator, folder: Path, state: dict[str, Any]) -> None:
    """Save model, optimizer, scheduler, guard and RNG, then give the folder its final name."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / STATE_FILE, state)
        _delete(folder)
        os.replace(temporary, folder)
    accelerator.wait_for_everyone()


def checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [
        folder
        for folder in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", folder.name) and (folder / STATE_FILE).exists()
    ]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def prune(output_dir: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints; 0 keeps all."""
    for leftover in output_dir.glob(".checkpoint-*.old"):
        shutil.rmtree(leftover)
    for folder in checkpoints(output_dir)[:-keep] if keep else []:
        _delete(folder)


def set_aside(output_dir: Path, step: int) -> None:
    """Rename the checkpoints after ``step``, of the run that a resume from there abandons.

    Left as they are they would be taken for the newest: resumed from, and kept in place of those
    that the resumed run writes. No name is taken twice, and nothing is deleted.
    """
    for folder in checkpoints(output_dir):
        if _step(folder) > step:
            number = 1
            while (aside := folder.with_name(f"{folder.name}.abandoned-{number}")).exists():
                number += 1
            os.replace(folder, aside)
            log.warning("resumed from step %d: %s is now %s", step, folder, aside.name)


def _delete(folder: Path) -> None:
    """Take the folder's name away first, so that a kill leaves no half of a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def find(output_dir: Path, resume_from: str) -> Path:
    """The checkpoint that ``resume_from_checkpoint`` means.

    Raises:
        ValueError: There is none.
    """
    if resume_from != "latest":
        folder = Path(resume_from)
        if not (folder / STATE_FILE).exists():
            raise ValueError(f"{folder} is no whole checkpoint (no {STATE_FILE})")
        return folder
    found = checkpoints(output_dir)
    if not found:
        raise ValueError(f"no checkpoint to resume from in {output_dir}")
    return found[-1]


def read_state(folder: Path) -> dict[str, Any]:
    """The run's own record in a checkpoint: step, tokens, data fingerprint."""
    state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    return state


@contextmanager
def moved_into(output_dir: Path) -> Iterator[Path]:
    """A scratch folder whose files move into ``output_dir`` when the block ends well."""
    scratch = output_dir / ".saving"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in sorted(scratch.iterdir()):
            os.replace(path, output_dir / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
