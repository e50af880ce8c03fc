"""Results on disk: one JSON file per (suite, method, variant, task, seed), facts only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeopt.files import write_json, write_jsonl

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Cell:
    """What one result file is about."""

    suite: str
    method: str
    variant: str
    task: str
    seed: int

    def path(self, folder: Path = FOLDER) -> Path:
        """``<folder>/<suite>/<method>-<variant>-<task>-<seed>.json``."""
        stem = f"{self.method}-{self.variant}-{self.task}-{self.seed}"
        return folder / self.suite / f"{stem}.json"


def save_failure(cell: Cell, facts: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Keep what is known of a run that raised: ``<folder>/<suite>/failed/<stem>.json``."""
    path = cell.path(folder)
    kept = path.parent / "failed" / path.name
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, facts)
    return kept


def load(cell: Cell, folder: Path = FOLDER) -> dict[str, Any] | None:
    """The facts of a cell, or None when it has not been run."""
    path = cell.path(folder)
    if not path.exists():
        return None
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def load_all(
    suite: str, folder: Path = FOLDER, *, without: Container[str] = ()
) -> Iterator[dict[str, Any]]:
    """Every result of a suite, in the order of file names, but for some tasks."""
    for path in sorted((folder / suite).glob("*.json")):
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if facts["task"] not in without:
            yield facts


def save(cell: Cell, facts: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Write a result whole or not at all."""
    path = cell.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)
    return path


def sha256_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of rows as sorted JSON, whatever the file they are written to looks like."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()


def save_transcripts(cell: Cell, rows: Sequence[Mapping[str, Any]], folder: Path = FOLDER) -> None:
    """Write the judged replies beside the result, one a line; nothing when there are none."""
    if rows:
        path = cell.path(folder).with_suffix(".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, rows)
