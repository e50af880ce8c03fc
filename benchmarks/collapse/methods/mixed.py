"""The same anchors mixed into the batches, at a given number of anchors per step."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.collapse.methods.base import Method, Setup, Training, plain_adamw
from benchmarks.collapse.suite import Batch
from safeopt import Anchors
from safeopt.anchors import IGNORED


class Mixed(Training):
    """AdamW on the task batch plus anchors drawn from the pool without replacement.

    The anchors are added, so every method sees the same task rows. A fractional
    ``anchors_per_step`` is met on average: 3.2 gives 3, 3, 3, 3, 4.
    """

    def __init__(self, setup: Setup, anchors_per_step: float) -> None:
        super().__init__(setup, plain_adamw(setup))
        self._anchors, self._rate, self._steps = setup.anchors, anchors_per_step, 0
        self._draw = torch.Generator().manual_seed(setup.seed)
        self._left: list[int] = []

    def step(self, batch: Batch) -> dict[str, float]:
        """One step on the task rows and this step's share of anchors."""
        count = int((self._steps + 1) * self._rate) - int(self._steps * self._rate)
        self._steps += 1
        chosen = self._next(count)
        mixed = joined(batch, self._anchors, chosen) if chosen else batch
        return super().step(mixed) | {"safety_rows": float(count)}

    def _next(self, count: int) -> list[int]:
        while len(self._left) < count:
            self._left += torch.randperm(len(self._anchors), generator=self._draw).tolist()
        chosen, self._left = self._left[:count], self._left[count:]
        return chosen


def joined(batch: Batch, anchors: Anchors, chosen: list[int]) -> Batch:
    """The task batch with the chosen anchors below it, right-padded to one length."""
    rows = anchors.batch(chosen)
    length = max(batch["input_ids"].shape[1], rows.input_ids.shape[1])
    blank = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}

    def fit(tensor: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=fill)

    return {
        key: torch.cat([fit(batch[key], fill), fit(getattr(rows, key), fill)])
        for key, fill in blank.items()
    }


def build(setup: Setup) -> Method:
    """AdamW with ``options["anchors_per_step"]`` anchors mixed in."""
    return Mixed(setup, **setup.options)
