"""Anchor losses: one number per anchor, from logits and reply labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.anchors import IGNORED


def _supervised(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flatten the predicted reply tokens: log-probabilities (R, V), targets (R,), rows (R,)."""
    targets = labels[:, 1:]
    rows, columns = torch.nonzero(targets != IGNORED, as_tuple=True)
    log_probs = torch.log_softmax(logits[rows, columns].float(), dim=-1)
    return log_probs, targets[rows, columns], rows


def _mean_per_anchor(values: Tensor, rows: Tensor, count: int) -> Tensor:
    total = values.new_zeros(count).index_add(0, rows, values)
    return total / torch.bincount(rows, minlength=count).clamp(min=1)


def reply_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of each anchor's reply, in nats per token.

    l_i = -1/|R_i| sum over t in R_i of log p(y_t | x, y_<t)

    Args:
        logits: (N, T, V), any floating dtype; reduced in fp32.
        labels: (N, T), -100 outside the reply; position t is predicted from t - 1.

    Returns:
        (N,) losses with gradient.
    """
    log_probs, targets, rows = _supervised(logits, labels)
    token_nll = -log_probs.gather(1, targets[:, None]).squeeze(1)
    return _mean_per_anchor(token_nll, rows, len(labels))


@dataclass(frozen=True)
class ReplyDistribution:
    """The aligned model's next-token distribution on one anchor's reply, coarsened.

    The ``top`` most likely tokens are kept apart and the rest is one event, so R reply tokens
    cost R x top floats and not R x V.

    Attributes:
        tokens: ids of the kept tokens, (R, top).
        log_probs: their log-probabilities, (R, top).
    """

    tokens: Tensor
    log_probs: Tensor


def reply_distributions(logits: Tensor, labels: Tensor, top: int = 64) -> list[ReplyDistribution]:
    """Record the aligned model's reply distribution of every anchor in a batch."""
    log_probs, _, rows = _supervised(logits, labels)
    kept = log_probs.topk(min(top, log_probs.shape[-1] - 1), dim=-1)
    return [
        ReplyDistribution(kept.indices[rows == i], kept.values[rows == i])
        for i in range(len(labels))
    ]


def _log_rest(log_probs: Tensor) -> Tensor:
    return torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - 1e-6))


def reply_kl(logits: Tensor, labels: Tensor, aligned: list[ReplyDistribution]) -> Tensor:
    """KL(aligned || current) on each anchor's reply, in nats per token.

    Taken over the coarsened events of `ReplyDistribution`; by the data-processing inequality it
    never exceeds the KL over the whole vocabulary, and both are zero at the aligned model.

    Args:
        logits: current logits, (N, T, V).
        labels: (N, T), -100 outside the reply.
        aligned: what `reply_distributions` recorded for the same anchors.

    Returns:
        (N,) losses with gradient.
    """
    log_probs, _, rows = _supervised(logits, labels)
    tokens = torch.cat([a.tokens for a in aligned]).to(logits.device)
    reference = torch.cat([a.log_probs for a in aligned]).to(logits.device)
    current = log_probs.gather(1, tokens)
    rest = _log_rest(reference)
    kl = (reference.exp() * (reference - current)).sum(-1)
    kl = kl + rest.exp() * (rest - _log_rest(current))
    return _mean_per_anchor(kl, rows, len(labels))
