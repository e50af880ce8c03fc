"""Weight EMA: AdamW, and the exponential moving average of its weights is what ships.

Source: Rethinking Safety in LLM Fine-tuning (2025, arXiv 2508.12531), which finds that a tuned
learning rate and an EMA of the weights lower unsafe answers without safety data.

Fidelity: the source's decay was not at hand; 0.99 averages over 100 of the 400 steps. The average
starts at the aligned weights, as in the source, so a longer average stays closer to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.collapse.methods.base import Method, Setup, Training, plain_adamw
from benchmarks.collapse.methods.vectors import copied
from benchmarks.collapse.suite import Batch


class WeightAverage(Training):
    """AdamW with a moving average m <- decay m + (1 - decay) theta after every step.

    Args:
        setup: the run.
        decay: share of the average that stays.
    """

    def __init__(self, setup: Setup, decay: float = 0.99) -> None:
        super().__init__(setup, plain_adamw(setup))
        self._decay = decay
        self.average = copied(self.parameters)

    def step(self, batch: Batch) -> dict[str, float]:
        """One AdamW step; the average follows."""
        facts = super().step(batch)
        weights = [p.detach() for p in self.parameters]
        torch._foreach_lerp_(self.average, weights, 1 - self._decay)
        return facts

    @contextmanager
    def deployed(self) -> Iterator[None]:
        """The average in place of the weights."""
        weights = copied(self.parameters)
        try:
            _store(self.parameters, self.average)
            yield
        finally:
            _store(self.parameters, weights)


@torch.no_grad()
def _store(parameters: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def build(setup: Setup) -> Method:
    """Options: ``decay``."""
    return WeightAverage(setup, **setup.options)
