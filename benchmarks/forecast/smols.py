"""Planned runs of SmolLM2-135M on grade-school maths, judged on held-out AdvBench prompts.

Two tasks: GSM8K's rows as they are, and the same questions with the final number as the reply.
The rate is constant from the first step on, so that one run, judged after each length, is a run
of each; its pilots are shared in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.collapse.chat import ADAPTER, data_file
from benchmarks.collapse.smol import LoraSmol, Smol
from benchmarks.forecast.planned import Cell, Run, refusals
from safeopt.demo import data
from safeopt.demo.plan import spread
from safeopt.demo.worker import load_aligned
from safeopt.evaluation import Decoding, refusal_judge
from safeopt.evaluation.generation import greedy_replies
from safeopt.evaluation.refusal import is_refusal
from safeopt.training.data import BatchPlan, collate, read_rows, tokenize
from safeopt.training.diagnose import PILOT_STEPS, READINGS

RESULTS = Path(__file__).parent / "results" / "smol.jsonl"
PARAMETERS = 134_515_008
SEED = 0
ANCHORS = 40
BATCH = 2
LENGTHS = (16, 32, 64)
PLANNED = (
    ("gsm8k", "full", 2e-4),
    ("gsm8k", "lora", 2e-3),
    ("numbers", "full", 1e-4),
    ("gsm8k", "full", 5e-5),
    ("numbers", "full", 4e-4),
    ("gsm8k", "lora", 5e-4),
)
"""Task, what trains and learning rate, each for every length."""

_PROMPTS, _REPLY_TOKENS = 120, 24


class Smols:
    """Two tasks x learning rates x lengths x {all weights, LoRA}."""

    results = RESULTS

    def cells(self, seeds: Sequence[int] = ()) -> Iterator[Cell]:
        """Every planned run."""
        for seed in seeds or (SEED,):
            for (task, mode, lr), steps in itertools.product(PLANNED, LENGTHS):
                yield Cell(task, seed, mode, lr, steps)

    def shared(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """Cells that differ in their length alone."""
        groups = itertools.groupby(cells, key=lambda cell: replace(cell, steps=0))
        return [sorted(group, key=lambda cell: cell.steps) for _, group in groups]

    def run(self, cells: Sequence[Cell]) -> Run:
        """The cells' run."""
        cell = cells[0]
        suite = {"full": Smol, "lora": LoraSmol}[cell.mode](cell.seed)
        anchors = refusals(Smol(0).anchors("gsm8k"), ANCHORS)
        return Run(
            lr=cell.lr,
            rate=lambda _: 1.0,
            lengths=[one.steps for one in cells],
            anchors=anchors,
            model=lambda: _model(suite),
            batches=lambda: _batches(cell),
            refusal_rate=_refusal_rate,
            aligned_rate=_aligned_rate,
            opening=4,
            pilot_steps=PILOT_STEPS,
            readings=READINGS,
            judge=refusal_judge(anchors, _tokenizer(), Decoding(_REPLY_TOKENS, dtype="bfloat16")),
        )


def _model(suite: Smol) -> nn.Module:
    """The aligned model; plain attention's backward pass in bf16 is faster on CPUs than SDPA's."""
    model: Any = suite.model()
    model.set_attn_implementation("eager")
    return model  # type: ignore[no-any-return]


def _batches(cell: Cell) -> Iterator[dict[str, Tensor]]:
    if cell.task == "gsm8k":
        yield from Smol(cell.seed).batches("gsm8k", BATCH)
    examples, tokenizer = _numbers(), _tokenizer()
    plan, step = BatchPlan(len(examples), BATCH, cell.seed), 0
    while True:
        yield collate([examples[i] for i in plan.indices(step)], tokenizer.pad_token_id)
        step += 1


@cache
def _numbers() -> list[Any]:
    """GSM8K's questions with nothing but the final number as the reply."""
    longest = Smol.usual().max_length
    rows = [
        {"prompt": row["question"], "reply": row["answer"].rsplit("####", 1)[1].strip()}
        for row in read_rows(data_file("gsm8k_train.jsonl"))
        if len(row["question"]) <= 4 * longest
    ]
    examples = tokenize(rows, _tokenizer(), max_length=1 << 12)
    return [example for example in examples if len(example.input_ids) <= longest]


@cache
def _tokenizer() -> Any:
    return load_aligned(ADAPTER)[1]


def _refusal_rate(model: nn.Module) -> float:
    prompts = spread(data.advbench().held_out, _PROMPTS)
    decoding = Decoding(_REPLY_TOKENS, dtype="bfloat16")
    replies = greedy_replies(model, _tokenizer(), prompts, decoding)
    return sum(map(is_refusal, replies)) / len(replies)


@cache
def _aligned_rate() -> float:
    return _refusal_rate(_model(Smol(0)))
