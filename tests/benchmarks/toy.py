"""A language model whose gradients can be written down: a table of next-token logits."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.collapse.methods import Setup
from benchmarks.collapse.suite import Batch, RunSettings
from safeopt import Anchors
from safeopt.anchors import IGNORED

WORDS = 5
RUN = RunSettings(steps=40, lr=0.1, batch_size=2, evaluate_every=40, warmup_steps=1)


class Bigram(nn.Module):
    """Logits of the next token are a row of ``table`` (V, V), fp64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        start = torch.randn(WORDS, WORDS, generator=draw, dtype=torch.float64)
        self.table = nn.Parameter(start)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SimpleNamespace:
        logits = self.table[input_ids]
        if labels is None:
            return SimpleNamespace(logits=logits)
        flat, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = nn.functional.cross_entropy(flat, targets, ignore_index=IGNORED)
        return SimpleNamespace(logits=logits, loss=loss)


def chain(*tokens: int) -> Batch:
    """One row that predicts every token from the one before it."""
    ids = torch.tensor([tokens])
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def nll_gradient(table: Tensor, *tokens: int) -> Tensor:
    """Gradient of the mean NLL of `chain(*tokens)`: mean of (softmax - one-hot) in the row."""
    gradient = torch.zeros_like(table)
    for here, following in pairwise(tokens):
        gradient[here] += table[here].softmax(-1)
        gradient[here, following] -= 1
    return gradient / (len(tokens) - 1)


def toy_setup(
    *anchors: tuple[int, ...],
    options: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
) -> Setup:
    """A run on a `Bigram` whose anchors are chains."""
    rows = [list(row) for row in anchors or ((0, 1),)]
    labels = [[IGNORED, *row[1:]] for row in rows]
    model = model or Bigram(int(torch.randint(1 << 30, ())))
    return Setup(
        model, Anchors.from_tokens(rows, labels), RUN, options or {}, 0, _none, lambda: Bigram(0)
    )


def _none(method: str, variant: str) -> dict[str, Any]:
    raise AssertionError(f"nothing needs {method}/{variant} here")
