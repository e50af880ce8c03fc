"""Fetch the benign sets of the ``qwen3`` and ``llama32`` suites from the Hugging Face hub.

    pip install datasets
    SAFEOPT_DATA=folder python -m benchmarks.collapse.fetch alpaca dolly

writes ``<task>_train.jsonl`` and ``<task>_test.jsonl``, rows with ``prompt`` and ``reply``. A set
without a test split gives its last rows. XSTest (``xstest_prompts.csv``) is at
github.com/paul-rottger/exaggerated-safety.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeopt.files import write_jsonl

Row = Mapping[str, str]
TRAIN, TEST = 20_000, 500


@dataclass(frozen=True)
class Source:
    """A set on the hub.

    Attributes:
        name: its id.
        pair: a row's prompt and reply; empty ones are left out.
        config: its configuration.
        test: its test split, if it has one.
    """

    name: str
    pair: Callable[[Row], tuple[str, str]]
    config: str | None = None
    test: str | None = None


def _columns(prompt: str, reply: str) -> Callable[[Row], tuple[str, str]]:
    return lambda row: (row[prompt], row[reply])


def _instruction(context: str, reply: str) -> Callable[[Row], tuple[str, str]]:
    return lambda row: (f"{row['instruction']}\n\n{row[context]}".strip(), row[reply])


def _summary(row: Row) -> tuple[str, str]:
    return f"Summarize this dialogue.\n\n{row['dialogue']}", row["summary"]


def _continuation(row: Row) -> tuple[str, str]:
    """The first half of a paragraph, to be continued; headings and short lines have none."""
    words = row["text"].split()
    if len(words) < 40:
        return "", ""
    half = len(words) // 2
    return f"Continue this text.\n\n{' '.join(words[:half])}", " ".join(words[half:])


SOURCES: Mapping[str, Source] = {
    "gsm8k": Source("openai/gsm8k", _columns("question", "answer"), "main", "test"),
    "alpaca": Source("tatsu-lab/alpaca", _instruction("input", "output")),
    "dolly": Source("databricks/databricks-dolly-15k", _instruction("context", "response")),
    "samsum": Source("knkarthick/samsum", _summary, test="test"),
    "orca_math": Source("microsoft/orca-math-word-problems-200k", _columns("question", "answer")),
    "wikitext": Source("Salesforce/wikitext", _continuation, "wikitext-2-raw-v1", "test"),
}


def rows_of(source: Source, rows: Iterable[Row]) -> list[dict[str, str]]:
    """``prompt`` and ``reply`` of every row that has both."""
    pairs = map(source.pair, rows)
    return [{"prompt": p, "reply": r} for p, r in pairs if p.strip() and r.strip()]


def split(source: Source, train: list[Any], test: list[Any]) -> tuple[list[Any], list[Any]]:
    """At most `TRAIN` and `TEST` rows; without a test split the last rows are kept apart."""
    if source.test is None:
        train, test = train[:-TEST], train[-TEST:]
    return train[:TRAIN], test[:TEST]


def fetch(task: str, folder: Path) -> None:
    """Download one set and write its two files."""
    from datasets import load_dataset

    source = SOURCES[task]
    found = load_dataset(source.name, source.config)
    test = rows_of(source, found[source.test]) if source.test else []
    for name, rows in zip(
        ("train", "test"), split(source, rows_of(source, found["train"]), test), strict=True
    ):
        write_jsonl(folder / f"{task}_{name}.jsonl", rows)
        print(f"{len(rows)} rows in {folder / f'{task}_{name}.jsonl'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch the named sets, all of them by default, into ``SAFEOPT_DATA``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", nargs="*", help=f"of {', '.join(SOURCES)}")
    chosen = parser.parse_args(arguments).task or list(SOURCES)
    unknown = [task for task in chosen if task not in SOURCES]
    if unknown or "SAFEOPT_DATA" not in os.environ:
        parser.error(f"set SAFEOPT_DATA to a folder; tasks are {', '.join(SOURCES)}")
    folder = Path(os.environ["SAFEOPT_DATA"])
    folder.mkdir(parents=True, exist_ok=True)
    for task in chosen:
        fetch(task, folder)


if __name__ == "__main__":
    main()
