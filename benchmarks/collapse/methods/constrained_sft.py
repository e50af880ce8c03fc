"""Constrained-SFT: the first reply tokens may leave the aligned model only so far.

Source: Safety Alignment Should Be Made More Than Just a Few Tokens Deep (Qi et al. 2024,
arXiv 2406.05946). Loss per token -2 / beta_t log sigmoid(beta_t d_t) with
d_t = log p(y_t) - log p_aligned(y_t); its gradient is that of the NLL times
w_t = 2 (1 - sigmoid(beta_t d_t)). beta is 0.1, times 5 on the first reply token and times 20 on the
second to fifth; w_t is floored at 0.001 in the authors' code.

Fidelity: the weighted-NLL form of the authors' code. The task rows' aligned log-probabilities are
taken when a row is seen and not cached beforehand: the same values, one more forward pass. In the
synthetic world replies have four tokens, so that every token is a constrained one. No safety data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.collapse.methods.anchored import (
    AlignedModel,
    reply_logits,
    reply_positions,
    reply_targets,
)
from benchmarks.collapse.methods.base import Method, Setup, Training, plain_adamw
from benchmarks.collapse.suite import Batch

_FIRST, _EARLY, _EARLY_TOKENS, _FLOOR = 5.0, 20.0, 5, 1e-3


class ConstrainedSFT(Training):
    """AdamW on sum_t w_t NLL_t / tokens.

    Args:
        setup: the run.
        beta: strength on late tokens; early ones are bound as in the source.
    """

    def __init__(self, setup: Setup, beta: float = 0.1) -> None:
        super().__init__(setup, plain_adamw(setup))
        self._beta, self._aligned = beta, AlignedModel(setup.model, self.spent)

    def gradients(self, batch: Batch) -> dict[str, float]:
        """Gradient of the weighted NLL."""
        targets = reply_targets(batch)[:, None]
        own = reply_logits(self.model, batch).log_softmax(-1).gather(1, targets)[:, 0]
        aligned = self._aligned.reply_logits(batch).log_softmax(-1).gather(1, targets)[:, 0]
        weights = token_weights(own.detach() - aligned, self._beta * bounds(batch))
        (-weights * own).mean().backward()
        self.spent.task_rows += len(batch["input_ids"])
        return {"loss": -own.mean().item(), "token_weight": weights.mean().item()}


def token_weights(gain: Tensor, beta: Tensor) -> Tensor:
    """w_t = 2 (1 - sigmoid(beta_t gain_t)), at least 0.001."""
    return (2 * torch.sigmoid(-beta * gain)).clamp(min=_FLOOR)


def bounds(batch: Batch) -> Tensor:
    """Factor beta_t / beta of every reply token, (R,): 5 on a row's first, 20 on four, then 1."""
    rows, columns = reply_positions(batch)
    first = torch.full((len(batch["labels"]),), columns.max().item() + 1)
    first = first.scatter_reduce(0, rows, columns, "amin")
    order = columns - first[rows]
    early = torch.where(order < _EARLY_TOKENS, _EARLY, 1.0)
    return torch.where(order == 0, _FIRST, early)


def build(setup: Setup) -> Method:
    """Options: ``beta``."""
    return ConstrainedSFT(setup, **setup.options)
