"""A hundred of the benchmark's own judgements, read by hand.

    python -m benchmarks.judge.hand --draw     # writes results/hand_sample.csv, last column empty
    python -m benchmarks.judge.hand            # once that column is filled: the agreement

Half of the sample was judged a refusal and half was not, by the matcher; within each half replies
are distinct, so that the commonest refusal is read once. The sheet leaves the matcher's verdict
out: the reader sees prompt set, prompt and opening, and writes ``yes`` or ``no`` for "it declines".
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.collapse.results import FOLDER
from benchmarks.markdown import fill
from safeopt.environment import environment
from safeopt.evaluation import Rate, is_refusal
from safeopt.files import write_json, write_text

HERE = Path(__file__).parent
SHEET = HERE / "results/hand_sample.csv"
COLUMNS = ("prompts", "prompt", "reply", "declines")
HALF = 50


def transcripts(folder: Path) -> Iterator[dict[str, Any]]:
    """Every judged reply of a suite's transcripts, in the order of the files."""
    for path in sorted(folder.glob("*.jsonl")):
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def draw(rows: Sequence[Mapping[str, Any]], half: int, seed: int) -> list[dict[str, str]]:
    """``half`` distinct replies judged refusals and as many others, shuffled, without verdicts."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    distinct = {row["reply"]: row for row in shuffled}.values()
    refused = [row for row in distinct if row["refused"]][:half]
    other = [row for row in distinct if not row["refused"]][:half]
    chosen = [{k: str(row[k]) for k in COLUMNS[:3]} | {"declines": ""} for row in refused + other]
    return random.Random(seed + 1).sample(chosen, len(chosen))


def agreement(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Counts of the four outcomes, the share that agrees with its interval, and Cohen's kappa.

    Raises:
        ValueError: a row is not labelled ``yes`` or ``no``.
    """
    bad = [number for number, row in enumerate(rows, 2) if row["declines"] not in ("yes", "no")]
    if bad:
        raise ValueError(f"{SHEET.name}, line {bad[0]}: write yes or no under 'declines'")
    pairs = [(is_refusal(row["reply"]), row["declines"] == "yes") for row in rows]
    counts = {(a, b): pairs.count((a, b)) for a in (True, False) for b in (True, False)}
    agreed = Rate(counts[True, True] + counts[False, False], len(pairs))
    matched, read = (sum(pair[k] for pair in pairs) / len(pairs) for k in (0, 1))
    chance = matched * read + (1 - matched) * (1 - read)
    return {
        "replies": len(pairs),
        "both_refusal": counts[True, True],
        "matcher_alone": counts[True, False],
        "reader_alone": counts[False, True],
        "neither": counts[False, False],
        "agreement": agreed.value,
        "interval_95": agreed.interval(),
        "kappa": (agreed.value - chance) / (1 - chance),
    }


def sentence(result: Mapping[str, Any]) -> str:
    """The agreement in words."""
    low, high = result["interval_95"]
    return (
        f"They agree in {result['agreement']:.0%} of {result['replies']} ({low:.0%} to {high:.0%}; "
        f"kappa {result['kappa']:.2f}): {result['both_refusal']} refusals for both, "
        f"{result['neither']} for neither, {result['matcher_alone']} for the matcher alone, "
        f"{result['reader_alone']} for the reader alone."
    )


def main() -> None:
    """Draw the sheet, or compare it with the matcher and write result and README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="draw a fresh sheet to be filled")
    if parser.parse_args().draw:
        sheet = io.StringIO()
        writer = csv.DictWriter(sheet, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(draw(list(transcripts(FOLDER / "smol")), HALF, seed=0))
        write_text(SHEET, sheet.getvalue())
        return
    with SHEET.open(encoding="utf-8", newline="") as stream:
        result = agreement(list(csv.DictReader(stream)))
    write_json(HERE / "results/hand.json", result | {"environment": environment()})
    readme = HERE / "README.md"
    write_text(readme, fill(readme.read_text(encoding="utf-8"), {"hand": sentence(result)}))
    print(sentence(result))


if __name__ == "__main__":
    main()
