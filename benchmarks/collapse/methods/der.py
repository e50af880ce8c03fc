"""DER: replay of the aligned model's logits on the anchors.

Source: Dark Experience for General Continual Learning (Buzzega et al. 2020, arXiv 2004.07211):
L = L_task + alpha E ||z - h(x)||^2 with stored logits z; alpha 0.1 to 1 by data set. As a keeper of
safety: Unforgotten Safety (2025, arXiv 2512.10150), where it beats the other continual learners.

Fidelity: the buffer is the anchor pool and does not grow by reservoir sampling (the run has one
task). Logits of a frozen copy are taken when an anchor is drawn and not stored: the same values.
The square is a mean over reply tokens and vocabulary, as in the authors' code. Labels of the
anchors are not used (that would be DER++).
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.collapse.methods.anchored import AlignedModel, Anchored, inputs, reply_logits
from benchmarks.collapse.methods.base import Method, Setup
from safeopt.anchors import AnchorBatch


class LogitReplay(Anchored):
    """Task loss plus alpha times the mean squared change of the anchors' logits.

    Args:
        setup: the run.
        anchors_per_step: the budget.
        alpha: strength.
    """

    def __init__(self, setup: Setup, anchors_per_step: float, alpha: float = 0.5) -> None:
        super().__init__(setup, anchors_per_step)
        self._alpha, self._aligned = alpha, AlignedModel(setup.model, self.spent)

    def penalty(self, anchors: AnchorBatch) -> Tensor:
        """Alpha times mean (z - h)^2 over reply tokens and vocabulary."""
        batch = inputs(anchors)
        stored, current = self._aligned.reply_logits(batch), reply_logits(self.model, batch)
        return self._alpha * torch.nn.functional.mse_loss(current, stored)


def build(setup: Setup) -> Method:
    """Options: ``anchors_per_step``, ``alpha``."""
    return LogitReplay(setup, **setup.options)
