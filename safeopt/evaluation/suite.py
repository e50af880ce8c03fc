"""One evaluation: refusal rate per prompt set, NLL per row set, transcripts beside the figures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeopt.evaluation.generation import Decoding, greedy_replies
from safeopt.evaluation.nll import reply_nll
from safeopt.evaluation.refusal import is_refusal
from safeopt.files import write_jsonl
from safeopt.intervals import Rate

TRANSCRIPT_WORDS = 12
"""Words of a reply that a transcript keeps: enough to judge it, too few to do harm."""


@dataclass(frozen=True)
class Verdict:
    """One judged reply.

    Attributes:
        prompts: Name of the prompt set.
        prompt: The user turn.
        reply: Its first ``TRANSCRIPT_WORDS`` words.
        refused: What the refusal matcher said of the whole decoded reply.
    """

    prompts: str
    prompt: str
    reply: str
    refused: bool


@dataclass(frozen=True)
class SuiteResult:
    """Figures of one model.

    Attributes:
        refusals: Refusals per prompt set.
        nll: Mean NLL of a reply token per row set, in nats.
        decoding: How the replies were decoded.
        seconds: Wall time of the evaluation.
        verdicts: Every judged reply.
    """

    refusals: Mapping[str, Rate]
    nll: Mapping[str, float]
    decoding: Decoding
    seconds: float
    verdicts: tuple[Verdict, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain figures for JSON, without the transcripts."""
        return {
            "refusals": {
                name: {
                    "refused": rate.count,
                    "total": rate.total,
                    "rate": rate.value,
                    "interval_95": list(rate.interval()),
                }
                for name, rate in self.refusals.items()
            },
            "nll": dict(self.nll),
            "decoding": {"strategy": "greedy", **vars(self.decoding)},
            "seconds": self.seconds,
        }


def evaluate(
    model: Any,
    tokenizer: Any,
    prompts: Mapping[str, Sequence[str]],
    rows: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    decoding: Decoding | None = None,
) -> SuiteResult:
    """Judge greedy replies to ``prompts`` and score the replies in ``rows``.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer, with a chat template.
        prompts: Prompt sets by name. A refusal is wanted on harmful sets and over-refusal on
            harmless ones; the figure is the same.
        rows: Row sets by name, scored by ``reply_nll``.
        decoding: Reply length and batch size.

    Raises:
        ValueError: A prompt set is empty, or a row is malformed.
    """
    empty = [name for name, members in prompts.items() if not members]
    if empty:
        raise ValueError(f"prompt sets without a prompt: {', '.join(empty)}")
    decoding = decoding or Decoding()
    start = time.perf_counter()
    verdicts = judge(model, tokenizer, prompts, decoding)
    scores = {name: reply_nll(model, tokenizer, few) for name, few in (rows or {}).items()}
    return SuiteResult(
        refusals={name: _rate(verdicts, name) for name in prompts},
        nll=scores,
        decoding=decoding,
        seconds=time.perf_counter() - start,
        verdicts=tuple(verdicts),
    )


def judge(
    model: Any, tokenizer: Any, prompts: Mapping[str, Sequence[str]], decoding: Decoding
) -> list[Verdict]:
    """Reply greedily to every prompt of every set and apply the refusal matcher."""
    flat = [(name, prompt) for name, members in prompts.items() for prompt in members]
    replies = greedy_replies(model, tokenizer, [prompt for _, prompt in flat], decoding)
    return [
        Verdict(name, prompt, " ".join(reply.split()[:TRANSCRIPT_WORDS]), is_refusal(reply))
        for (name, prompt), reply in zip(flat, replies, strict=True)
    ]


def write_transcripts(path: Path, verdicts: Iterable[Verdict]) -> None:
    """Write one judged reply a line, whole or not at all."""
    write_jsonl(path, (vars(verdict) for verdict in verdicts))


def _rate(verdicts: Sequence[Verdict], name: str) -> Rate:
    refused = [verdict.refused for verdict in verdicts if verdict.prompts == name]
    return Rate(sum(refused), len(refused))
