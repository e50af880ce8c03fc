from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safeopt import Anchors

GOOD = {"prompt": "How do I pick a lock?", "reply": "I can't help with that.", "kind": "refuse"}


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_chat_template_and_reply_mask(tmp_path: Path, tokenizer: Any) -> None:
    comply = {
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        "reply": "Hello!",
        "kind": "comply",
    }
    anchors = Anchors.from_jsonl(write(tmp_path / "a.jsonl", GOOD, "", comply), tokenizer)
    assert anchors.kinds == ("refuse", "comply")
    for ids, labels, row in zip(anchors.input_ids, anchors.labels, (GOOD, comply), strict=True):
        reply = labels[labels != -100]
        assert tokenizer.decode(reply) == f"{row['reply']}<|end|>"
        assert torch.equal(ids[-len(reply) :], reply)
        assert tokenizer.decode(ids[: -len(reply)]).endswith("<|assistant|>")


def test_kind_is_refuse_by_default(tokenizer: Any) -> None:
    rows = [{"prompt": "p", "reply": "r"}]
    assert Anchors.from_rows(rows, tokenizer).kinds == ("refuse",)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{not json", "not JSON"),
        ("[1]", "expected a JSON object, got a list"),
        ({"prompt": "p"}, 'needs a "reply"'),
        ({"prompt": "p", "reply": "  "}, 'needs a "reply"'),
        ({"reply": "r"}, 'either "prompt" or "messages"'),
        ({"prompt": "p", "messages": [], "reply": "r"}, 'either "prompt" or "messages"'),
        ({"prompt": "", "reply": "r"}, '"prompt" must be a non-empty string'),
        ({"prompt": "p", "reply": "r", "kind": "reject"}, '"refuse" or "comply"'),
    ],
)
def test_bad_rows_are_named_by_file_and_line(
    tmp_path: Path, tokenizer: Any, row: Any, complaint: str
) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, row)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: .*") as error:
        Anchors.from_jsonl(path, tokenizer)
    assert complaint in str(error.value)


def test_a_reply_is_never_cut(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: \d+ tokens do not fit max_length=20"):
        Anchors.from_jsonl(path, tokenizer, max_length=20)


def test_an_empty_file_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no anchors in it"):
        Anchors.from_jsonl(write(tmp_path / "a.jsonl", ""), tokenizer)


def test_tokens_and_batch() -> None:
    anchors = Anchors.from_tokens(
        [[1, 2, 3], [4, 5, 6, 7]], [[-100, 2, 3], [-100, -100, 6, 7]], ["refuse", "comply"]
    )
    batch = anchors.batch()
    assert batch.input_ids.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, 2, 3, -100], [-100, -100, 6, 7]]
    assert len(anchors.batch([1])) == 1


@pytest.mark.parametrize(
    ("ids", "labels", "kinds", "complaint"),
    [
        ([], [], None, "no anchors"),
        ([[1, 2]], [[-100, -100]], None, "no reply tokens"),
        ([[1, 2]], [[1, -100]], None, "no reply tokens"),
        ([[1, 2]], [[-100]], None, "lists of one length"),
        ([[1, 2]], [], None, "one entry per anchor"),
        ([[1, 2]], [[-100, 2]], ["refuse", "comply"], "one entry per anchor"),
        ([[1, 2]], [[-100, 2]], ["maybe"], '"refuse" or "comply"'),
        ([[-1, 2]], [[-100, 2]], None, "negative token id"),
    ],
)
def test_bad_tokens(ids: Any, labels: Any, kinds: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Anchors.from_tokens(ids, labels, kinds)
