"""SafeGrad: remove what opposes the safety gradient, then add the safety gradient.

Source: Gradient Surgery for Safe LLM Fine-Tuning (2025, arXiv 2508.07172). g_a is the gradient of
KL(p_aligned || p_theta) on safety prompts; if <g_u, g_a> < 0 then
g_u <- g_u - <g_u, g_a> / ||g_a||^2 g_a; the update follows g_u + rho g_a.

Fidelity: rho is not given in what we could read; 1 here. The KL is taken on the anchors' replies,
teacher forced. The combined gradient goes into AdamW, before its moments, as in the source.
"""

from __future__ import annotations

from benchmarks.collapse.methods.anchored import (
    AlignedModel,
    AnchorBudget,
    inputs,
    kl,
    reply_logits,
)
from benchmarks.collapse.methods.base import Method, Setup, Training, plain_adamw
from benchmarks.collapse.methods.vectors import set_gradients, take_gradients, without_conflict
from benchmarks.collapse.suite import Batch


class SafeGrad(Training):
    """AdamW on the task gradient after surgery plus rho times the KL gradient.

    Args:
        setup: the run.
        anchors_per_step: the budget.
        rho: weight of the safety gradient.
    """

    def __init__(self, setup: Setup, anchors_per_step: float, rho: float = 1.0) -> None:
        super().__init__(setup, plain_adamw(setup))
        self._budget = AnchorBudget(setup, anchors_per_step, self.spent)
        self._aligned, self._rho = AlignedModel(setup.model, self.spent), rho

    def gradients(self, batch: Batch) -> dict[str, float]:
        """Surgery on the task gradient with the gradient of this step's anchors."""
        facts = super().gradients(batch)
        anchors = self._budget.next()
        if anchors is None:
            return facts
        task, rows = take_gradients(self.parameters), inputs(anchors)
        kl(self._aligned.reply_logits(rows), reply_logits(self.model, rows)).backward()
        safety = take_gradients(self.parameters)
        kept = without_conflict(task, safety)
        both = [u + self._rho * a for u, a in zip(kept, safety, strict=True)]
        set_gradients(self.parameters, both)
        return facts


def build(setup: Setup) -> Method:
    """Options: ``anchors_per_step``, ``rho``."""
    return SafeGrad(setup, **setup.options)
