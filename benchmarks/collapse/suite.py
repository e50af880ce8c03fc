"""What a suite offers: an aligned model, anchors, benign task batches and an evaluation.

Suites know nothing of methods and methods nothing of suites; the runner brings one of each
together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from safeopt import Anchors

Batch = dict[str, Tensor]  # "input_ids", "labels" (-100 masked), "attention_mask": (rows, tokens)


@dataclass(frozen=True)
class RunSettings:
    """How long and how fast a suite fine-tunes, the same for every method unless it says so.

    The learning rate rises linearly over ``warmup_steps`` and then falls linearly towards zero.
    """

    steps: int
    lr: float
    batch_size: int
    evaluate_every: int
    warmup_steps: int
    log_every: int = 10
    weight_decay: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate's share of its peak at a step counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return max(0.0, (self.steps - step) / max(1, self.steps - self.warmup_steps))


class Suite(Protocol):
    """One seed of a benchmark world.

    Attributes:
        name: folder of its results.
        tasks: names of its benign fine-tuning tasks.
        settings: the fine-tuning run.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def tasks(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def settings(self) -> RunSettings: ...  # noqa: D102

    def model(self) -> nn.Module:
        """A fresh copy of the aligned model; ``model(**batch).loss`` is the mean reply NLL."""

    def base(self) -> nn.Module:
        """The same model before it was aligned."""

    def anchors(self, task: str) -> Anchors:
        """The pool that every method draws from when it is fine-tuned on this task."""

    def batches(self, task: str, batch_size: int) -> Iterator[Batch]:
        """Endless training batches, equal for every method."""

    def aligned(self, task: str) -> dict[str, float]:
        """Held-out metrics of the aligned model, before any fine-tuning."""

    def transcripts(self) -> Sequence[Mapping[str, Any]]:
        """Judged replies of the last evaluation; none where replies are not text."""

    def refused(self) -> Mapping[str, Sequence[bool]]:
        """What the last evaluation said of each "harmful" and each "harmless" prompt."""

    def evaluate(self, model: nn.Module, task: str) -> dict[str, float]:
        """Held-out metrics, among them ``asr``, ``over_refusal`` and ``task_nll``."""
