from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safeopt.evaluation import Decoding, Verdict, evaluate, reply_nll, write_transcripts
from safeopt.evaluation.suite import TRANSCRIPT_WORDS

ROWS = [
    {"prompt": "Two and two?", "reply": "Four."},
    {"prompt": "A colour", "reply": "Blue is a colour that I like."},
    {"prompt": "Hello", "reply": "Hi!"},
]


@torch.no_grad()
def direct_nll(model: Any, tokenizer: Any) -> float:
    """Row by row, without padding, from the log-softmax itself."""
    total, count = 0.0, 0
    for row in ROWS:
        turns = [{"role": "user", "content": row["prompt"]}]
        head = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        turns.append({"role": "assistant", "content": row["reply"]})
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        start = len(tokenizer(head)["input_ids"])
        ids = torch.tensor([tokenizer(whole)["input_ids"]])
        log_p = model(ids).logits[0].log_softmax(-1)
        for t in range(start, ids.shape[1]):
            total -= float(log_p[t - 1, ids[0, t]])
            count += 1
    return total / count


def test_nll_is_the_mean_over_reply_tokens(tokenizer: Any, make_model: Callable) -> None:
    model = make_model().eval()
    expected = direct_nll(model, tokenizer)
    for batch_size in (1, 2, 8):
        found = reply_nll(model, tokenizer, ROWS, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-5)


def test_figures_match_the_transcripts(
    tokenizer: Any, make_model: Callable, tmp_path: Path
) -> None:
    prompts = {"harmful": ["a", "b", "c"], "harmless": ["d"]}
    result = evaluate(make_model(), tokenizer, prompts, {"task": ROWS}, Decoding(6))
    path = tmp_path / "transcripts.jsonl"
    write_transcripts(path, result.verdicts)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == ["a", "b", "c", "d"]
    for name, rate in result.refusals.items():
        judged = [line["refused"] for line in lines if line["prompts"] == name]
        assert (rate.count, rate.total) == (sum(judged), len(judged))
    facts = json.loads(json.dumps(result.as_dict()))
    assert facts["refusals"]["harmful"]["total"] == 3
    assert facts["nll"].keys() == {"task"}
    assert facts["decoding"]["max_new_tokens"] == 6


def test_transcripts_keep_only_the_first_words(tokenizer: Any, make_model: Callable) -> None:
    result = evaluate(make_model(eos_token_id=None), tokenizer, {"x": ["a"]}, None, Decoding(200))
    assert all(len(v.reply.split()) <= TRANSCRIPT_WORDS for v in result.verdicts)


def test_verdicts_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "transcripts.jsonl"
    write_transcripts(path, [Verdict("x", "a", "b", True)])
    before = path.read_bytes()

    def broken() -> Any:
        yield Verdict("x", "c", "d", False)
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_transcripts(path, broken())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_empty_prompt_set_is_named(tokenizer: Any, make_model: Callable) -> None:
    with pytest.raises(ValueError, match="harmless"):
        evaluate(make_model(), tokenizer, {"harmful": ["a"], "harmless": []})
