"""KL to the aligned model on the anchors' replies.

Source: the penalty of RLHF (Ziegler et al. 2019, arXiv 1909.08593) turned on safety examples, as in
Learning without Forgetting (Li and Hoiem 2016, arXiv 1606.09282):
L = L_task + beta KL(p_aligned || p_theta) on reply tokens.

Fidelity: full vocabulary, forward KL, teacher forced on the anchors' replies; beta 1.
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.collapse.methods.anchored import AlignedModel, Anchored, inputs, kl, reply_logits
from benchmarks.collapse.methods.base import Method, Setup
from safeopt.anchors import AnchorBatch


class KLToAligned(Anchored):
    """Task loss plus beta times the KL divergence from the aligned model, nats per token.

    Args:
        setup: the run.
        anchors_per_step: the budget.
        beta: strength.
    """

    def __init__(self, setup: Setup, anchors_per_step: float, beta: float = 1.0) -> None:
        super().__init__(setup, anchors_per_step)
        self._beta, self._aligned = beta, AlignedModel(setup.model, self.spent)

    def penalty(self, anchors: AnchorBatch) -> Tensor:
        """Beta times mean KL over reply tokens."""
        batch = inputs(anchors)
        return self._beta * kl(self._aligned.reply_logits(batch), reply_logits(self.model, batch))


def build(setup: Setup) -> Method:
    """Options: ``anchors_per_step``, ``beta``."""
    return KLToAligned(setup, **setup.options)
