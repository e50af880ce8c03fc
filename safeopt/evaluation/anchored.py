"""Which anchors a model still refuses, judged on its own greedy replies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.anchors import IGNORED, Anchors
from safeopt.evaluation.generation import Decoding, greedy_continuations
from safeopt.evaluation.refusal import is_refusal


def refusal_judge(
    anchors: Anchors, tokenizer: Any, decoding: Decoding | None = None
) -> Callable[[nn.Module], Tensor]:
    """Return what tells, of a model, which anchors it refuses, (N,).

    The prompts are the anchors' tokens before their reply.
    """
    prompts = [
        ids[: int(torch.nonzero(labels != IGNORED)[0])].tolist()
        for ids, labels in zip(anchors.input_ids, anchors.labels, strict=True)
    ]

    def judge(model: nn.Module) -> Tensor:
        replies = greedy_continuations(model, tokenizer, prompts, decoding)
        return torch.tensor([is_refusal(reply) for reply in replies])

    return judge
