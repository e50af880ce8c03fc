from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from safeopt.anchors import IGNORED
from safeopt.training.data import BatchPlan, Example, collate, read_rows, tokenize


def target_text(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "completion": "hello"},
        {"prompt": "hi", "reply": "hello", "kind": "comply"},
        {"instruction": "hi", "input": "", "output": "hello"},
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "hello"},
            ]
        },
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "completion": [{"role": "assistant", "content": "hello"}],
        },
    ],
)
def test_every_layout_gives_the_same_example(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    (example,) = tokenize([row], tokenizer, max_length=99)
    assert tokenizer.decode(example.input_ids) == "<|user|>hi<|end|><|assistant|>hello<|end|>"
    assert target_text(example, tokenizer) == "hello<|end|>"


def test_every_assistant_turn_carries_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (example,) = tokenize([row], tokenizer, max_length=99)
    assert target_text(example, tokenizer) == "b<|end|>d<|end|>"


def test_text_rows_and_full_loss_train_on_every_token(tokenizer: PreTrainedTokenizerFast) -> None:
    (text,) = tokenize([{"text": "hello"}], tokenizer, max_length=99)
    assert target_text(text, tokenizer) == "hello<|end|>"
    row = {"prompt": "hi", "reply": "hello"}
    (full,) = tokenize([row], tokenizer, max_length=99, completion_only_loss=False)
    assert full.labels == full.input_ids


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": "b"}, r"columns \['answer', 'question'\] fit no layout"),
        ({"prompt": "a", "reply": " "}, "non-empty string"),
        ({"prompt": "a", "reply": 3}, "non-empty string"),
        ({"messages": []}, "non-empty list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "last message"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "first message"),
        ({"prompt": "a" * 50, "reply": "b"}, "no reply token within max_length=40"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(
    row: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=rf"rows\.jsonl:3: .*{message}"):
        tokenize([{**row, "_where": "rows.jsonl:3"}], tokenizer, max_length=40)


def test_rows_that_are_cut_are_counted(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "a", "reply": "b" * length} for length in (2, 50, 60)]
    examples = tokenize(rows, tokenizer, max_length=20)
    assert [len(example.input_ids) for example in examples] == [7, 20, 20]
    assert "2 of 3 rows are cut to max_length=20" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n\n{oops\n', r"rows\.jsonl:3: not JSON"),
        ("[1]\n", ":1: "),
        ("\n", "no rows"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(file)


def test_missing_template_says_what_to_do(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="chat template"):
        tokenize([{"prompt": "a", "reply": "b"}], bare, max_length=9)


def test_collate_pads_on_the_right() -> None:
    batch = collate([Example((1, 2, 3), (IGNORED, 2, 3)), Example((4, 5), (IGNORED, 5))], 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [IGNORED, 5, IGNORED]]


@given(rows=st.integers(1, 40), per_step=st.integers(1, 16), seed=st.integers(0, 2**31))
def test_plan_shows_every_row_once_an_epoch(rows: int, per_step: int, seed: int) -> None:
    plan = BatchPlan(rows, per_step, seed)
    stream = [index for step in range(3 * rows) for index in plan.indices(step)]
    for epoch in range(3):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_plan_depends_on_the_seed_alone() -> None:
    assert BatchPlan(50, 8, 1).indices(9) == BatchPlan(50, 8, 1).indices(9)
    assert BatchPlan(50, 8, 1).indices(0) != BatchPlan(50, 8, 2).indices(0)
