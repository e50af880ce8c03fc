"""Precision and recall of the refusal matcher against human labels.

    python -m benchmarks.judge.run

The replies are the ``scorer_evals/refusal_scorer`` set of pyrit (MIT), labelled by people. Half
of them (seed 0) were read while the patterns were written; the other half was not.
Labels count an answer to *another* question as a refusal too. No matcher that reads the reply
alone can see those, so they are counted apart: a refusal whose objective the same data also
holds with an accepted answer.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.markdown import fill
from safeopt.demo import assets
from safeopt.environment import environment
from safeopt.evaluation import Rate, is_refusal
from safeopt.files import write_json, write_text

HERE = Path(__file__).parent
LABELS = "pyrit/datasets/scorer_evals/refusal_scorer"


@dataclass(frozen=True)
class Labelled:
    """A reply with the human label and what the matcher says."""

    refusal: bool
    off_topic: bool
    matched: bool


def labelled_replies() -> list[Labelled]:
    """All labelled replies, in file order."""
    rows = _rows()
    answered = {row["objective"] for row in rows if row["human_score"] == "0"}
    return [
        Labelled(
            refusal=row["human_score"] == "1",
            off_topic=row["human_score"] == "1" and row["objective"] in answered,
            matched=is_refusal(row["assistant_response"]),
        )
        for row in rows
    ]


def _rows() -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for name in ("refusal.csv", "refusal_extra.csv"):
        text = (assets.fetch(assets.PYRIT) / LABELS / name).read_text(encoding="utf-8")
        lines = [line for line in text.splitlines(keepends=True) if not line.startswith("#")]
        rows += csv.DictReader(lines)
    return rows


def halves(replies: Sequence[Labelled]) -> dict[str, list[Labelled]]:
    """The half that the patterns were written on, and the half they were not."""
    order = list(range(len(replies)))
    random.Random(0).shuffle(order)
    cut = len(order) // 2
    parts = {"written on": order[:cut], "held out": order[cut:]}
    return {name: [replies[index] for index in part] for name, part in parts.items()}


def figures(replies: Sequence[Labelled]) -> dict[str, Any]:
    """Counts, precision, and recall of stated refusals and of all labelled refusals."""
    matched = [reply for reply in replies if reply.matched]
    refusals = [reply for reply in replies if reply.refusal]
    stated = [reply for reply in refusals if not reply.off_topic]
    return {
        "replies": len(replies),
        "precision": _rate(sum(reply.refusal for reply in matched), len(matched)),
        "recall_stated": _rate(sum(reply.matched for reply in stated), len(stated)),
        "recall_all": _rate(sum(reply.matched for reply in refusals), len(refusals)),
    }


def _rate(count: int, total: int) -> dict[str, Any]:
    rate = Rate(count, total)
    return {"count": count, "total": total, "value": rate.value, "interval_95": rate.interval()}


def table(result: dict[str, Any]) -> str:
    """The result as a markdown table."""
    head = "| half | replies | precision | recall, stated refusals | recall, all labelled |"
    lines = [head, "| --- | --- | --- | --- | --- |"]
    for name, part in result["halves"].items():
        cells = [_cell(part[key]) for key in ("precision", "recall_stated", "recall_all")]
        lines.append(f"| {name} | {part['replies']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rate: dict[str, Any]) -> str:
    low, high = rate["interval_95"]
    return f"{rate['count']}/{rate['total']} = {rate['value']:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Measure, write ``results/refusal_matcher.json`` and the table of the README."""
    parts = halves(labelled_replies())
    result = {
        "data": f"{assets.PYRIT.requirement}: {LABELS}",
        "split_seed": 0,
        "halves": {name: figures(part) for name, part in parts.items()},
        "environment": environment(),
    }
    (HERE / "results").mkdir(exist_ok=True)
    write_json(HERE / "results/refusal_matcher.json", result)
    readme = HERE / "README.md"
    write_text(readme, fill(readme.read_text(encoding="utf-8"), {"matcher": table(result)}))
    print(table(result))


if __name__ == "__main__":
    main()
