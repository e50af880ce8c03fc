"""Settings of one demo run and the rows and prompts they select."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from safeopt.demo import data
from safeopt.evaluation import Decoding
from safeopt.files import write_json

Method = Literal["aligned", "adamw", "safe_adamw"]
METHODS: tuple[Method, ...] = ("aligned", "adamw", "safe_adamw")
ADVBENCH, STRONGREJECT, OVERREFUSAL = "advbench", "strongreject", "overrefusal"
TASK = "gsm8k"


@dataclass(frozen=True)
class Plan:
    """What a demo run does; both trainings share all of it but the optimizer.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Peak learning rate; it falls linearly to zero.
        warmup_steps: Steps of linear warm-up before the peak.
        batch_size: Rows a step.
        max_length: Longest training row in tokens; answers beyond it are cut.
        task_rows: GSM8K rows trained on; the others are held out for the task NLL.
        seed: Seed of the row order and of the guard.
        refuse_anchors: Harmful AdvBench training prompts with the aligned model's own refusal.
        comply_anchors: Harmless prompts with the aligned model's own answer.
        prompts: Prompts per harmful set of the final evaluation.
        probe_every: Steps between probes of the curve.
        probe_prompts: Held-out AdvBench prompts of a probe.
        max_new_tokens: Length of judged replies.
        precision: ``"bf16"`` for bf16 autocast and decoding, ``"no"`` for fp32 throughout.
        guard: Keywords of ``safeopt.Guard`` that differ from its defaults.
    """

    steps: int = 60
    learning_rate: float = 2e-4
    warmup_steps: int = 4
    batch_size: int = 4
    max_length: int = 192
    task_rows: int = 70
    seed: int = 0
    refuse_anchors: int = 64
    comply_anchors: int = 24
    prompts: int = 100
    probe_every: int = 12
    probe_prompts: int = 24
    max_new_tokens: int = 24
    precision: Literal["bf16", "no"] = "no"
    guard: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.probe_every < 1:
            raise ValueError(f"steps and probe_every must be at least 1; got {self.steps}")

    @property
    def decoding(self) -> Decoding:
        """How judged replies are decoded."""
        return self.long_decoding(self.max_new_tokens)

    def long_decoding(self, max_new_tokens: int) -> Decoding:
        """The same decoding with another reply length."""
        dtype = "bfloat16" if self.precision == "bf16" else None
        return Decoding(max_new_tokens=max_new_tokens, dtype=dtype)

    def train_rows(self) -> tuple[data.Row, ...]:
        """Benign rows that both optimizers train on."""
        return _task_rows()[: self.task_rows]

    def test_rows(self) -> tuple[data.Row, ...]:
        """Benign rows of the task NLL."""
        return _task_rows()[self.task_rows :]

    def prompt_sets(self) -> dict[str, tuple[str, ...]]:
        """Prompts of the final evaluation, none of them seen in alignment or as an anchor."""
        return {
            ADVBENCH: data.advbench().held_out[: self.prompts],
            STRONGREJECT: spread(data.strongreject(), self.prompts),
            OVERREFUSAL: data.overrefusal().held_out,
        }

    def write(self, path: Path) -> None:
        """Write the plan as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read what ``write`` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def _task_rows() -> tuple[data.Row, ...]:
    # The one question longer than this would leave no room for its answer.
    return tuple(row for row in data.gsm8k() if len(row["prompt"]) <= 500)


def spread(prompts: tuple[str, ...], count: int) -> tuple[str, ...]:
    """``count`` prompts at even distances, for sets whose file is sorted by category."""
    if count >= len(prompts):
        return prompts
    return tuple(prompts[index * len(prompts) // count] for index in range(count))
