"""The training loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from safeopt.anchors import IGNORED


def nll_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over target tokens of ``-log p(token)``, in nats and fp32.

    Args:
        logits: (rows, length, vocabulary).
        labels: (rows, length), -100 where no loss is taken; position t is predicted from t - 1.
    """
    targets = labels[:, 1:]
    kept = targets != IGNORED
    # Only target positions reach the softmax: with a large vocabulary the rest is the cost.
    return F.cross_entropy(logits[:, :-1][kept].float(), targets[kept], reduction="sum")
