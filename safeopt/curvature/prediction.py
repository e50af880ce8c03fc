"""Predictions: the supervised logits that Gauss-Newton and Fisher operators look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safeopt.anchors import IGNORED, AnchorBatch
from safeopt.geometry.capture import logits_of


@dataclass(frozen=True)
class Prediction:
    """Softmax predictions z_r with targets; the loss is sum_r w_r (-log softmax(z_r)[y_r]).

    Attributes:
        logits: z, (R, V).
        targets: y, class of each row, (R,).
        weights: w, weight of each row in the loss, (R,); usually they sum to 1.
        examples: which example a row belongs to, 0 to N - 1, (R,).
    """

    logits: Tensor
    targets: Tensor
    weights: Tensor
    examples: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> Prediction:
        """One row per example, averaged: plain classification.

        Args:
            logits: (N, V).
            targets: (N,).
        """
        count = len(logits)
        weights = torch.full((count,), 1 / count, dtype=logits.dtype, device=logits.device)
        return cls(logits, targets, weights, torch.arange(count, device=logits.device))

    def loss(self) -> Tensor:
        """The weighted cross-entropy, a scalar."""
        return self.weights @ self.row_losses()

    def row_losses(self) -> Tensor:
        """Cross-entropy of each row in nats, (R,)."""
        log_probs = torch.log_softmax(self.logits, dim=-1)
        return -log_probs.gather(1, self.targets[:, None]).squeeze(1)


Predict = Callable[[nn.Module], Prediction]


def reply_predictions(batch: AnchorBatch, examples: float | None = None) -> Predict:
    """Predictions of the labelled tokens: the mean over examples of each one's mean token loss.

    Args:
        batch: token ids and labels, -100 outside the reply.
        examples: what the sum over examples is divided by; their number by default. Under DDP with
            batches of different sizes, pass the examples of all ranks over the number of ranks, so
            that DDP's mean over ranks is the mean over examples.
    """
    targets = batch.labels[:, 1:]
    rows, columns = torch.nonzero(targets != IGNORED, as_tuple=True)
    lengths = torch.bincount(rows, minlength=len(batch))
    weights = 1 / (lengths[rows] * (len(batch) if examples is None else examples))

    def predict(model: nn.Module) -> Prediction:
        logits = logits_of(model, batch)[rows, columns]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return Prediction(logits, targets[rows, columns], weights.to(logits.dtype), rows)

    return predict
