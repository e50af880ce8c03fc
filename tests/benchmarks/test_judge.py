from __future__ import annotations

import csv
import json

import pytest

from benchmarks.judge import hand

REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "With the flat of a knife."


def sheet(*labels: str) -> list[dict[str, str]]:
    replies = [REFUSAL, REFUSAL, ANSWER, ANSWER]
    return [{"reply": r, "declines": d} for r, d in zip(replies, labels, strict=True)]


def test_agreement_counts_every_outcome() -> None:
    result = hand.agreement(sheet("yes", "no", "no", "no"))
    outcomes = ("both_refusal", "matcher_alone", "reader_alone", "neither")
    assert [result[k] for k in outcomes] == [1, 1, 0, 2]
    assert result["agreement"] == 0.75
    assert result["kappa"] == pytest.approx(0.5)  # (0.75 - 0.5) / (1 - 0.5)


def test_an_unlabelled_row_is_named() -> None:
    with pytest.raises(ValueError, match="line 4: write yes or no"):
        hand.agreement(sheet("yes", "yes", "", "no"))


def test_a_sheet_holds_distinct_replies_of_both_verdicts_and_no_verdict() -> None:
    rows = [
        {"prompts": "p", "prompt": str(i), "reply": f"reply {i // 3}", "refused": i % 2 == 0}
        for i in range(300)
    ]
    drawn = hand.draw(rows, half=20, seed=3)
    assert len({row["reply"] for row in drawn}) == len(drawn) == 40
    assert all(set(row) == set(hand.COLUMNS) and row["declines"] == "" for row in drawn)
    assert drawn != hand.draw(rows, half=20, seed=4)


def test_committed_agreement_is_that_of_the_committed_sheet() -> None:
    with hand.SHEET.open(encoding="utf-8", newline="") as stream:
        fresh = hand.agreement(list(csv.DictReader(stream)))
    stored = json.loads((hand.SHEET.parent / "hand.json").read_text(encoding="utf-8"))
    assert {k: stored[k] for k in fresh} == json.loads(json.dumps(fresh))
    readme = (hand.HERE / "README.md").read_text(encoding="utf-8")
    assert hand.sentence(stored) in readme
