"""EWC: a spring weighted by the diagonal Fisher of the anchors.

Source: Overcoming Catastrophic Forgetting (Kirkpatrick et al. 2017, arXiv 1612.00796):
L = L_task + lambda / 2 sum_j F_j (theta_j - theta*_j)^2. Lambda 100 is what SafeAnchor's comparison
(arXiv 2604.17691) uses.

Fidelity: F_j is the mean of squared gradients of single anchors (some ports square the gradient of
a batch, which mixes signs). The anchors' own replies are the labels, so it is the empirical Fisher.
At an aligned model that refuses with certainty these gradients are small; hence a wide sweep of
lambda. The whole pool is looked at once, before the first step: EWC has no use for the rest of the
budget.
"""

from __future__ import annotations

import torch

from benchmarks.collapse.methods.anchored import AnchorBudget, own_gradients
from benchmarks.collapse.methods.base import Method, Setup, Training, plain_adamw
from benchmarks.collapse.methods.vectors import copied
from benchmarks.collapse.suite import Batch


class ElasticWeights(Training):
    """Gradient g + strength F (theta - theta*).

    Args:
        setup: the run.
        anchors_per_step: the budget, of which one pass over the pool is used.
        strength: lambda.
    """

    def __init__(self, setup: Setup, anchors_per_step: float, strength: float = 100.0) -> None:
        super().__init__(setup, plain_adamw(setup))
        self._strength, self._start = strength, copied(self.parameters)
        budget = AnchorBudget(setup, anchors_per_step, self.spent)
        anchors = budget.spend_first(len(setup.anchors))
        self.fisher = [torch.zeros_like(p) for p in self.parameters]
        for gradients in own_gradients(setup.model, anchors):
            for total, gradient in zip(self.fisher, gradients.values(), strict=True):
                total += gradient.square() / len(anchors)

    def gradients(self, batch: Batch) -> dict[str, float]:
        """Gradient of the task loss and the weighted spring."""
        facts = super().gradients(batch)
        for p, fisher, start in zip(self.parameters, self.fisher, self._start, strict=True):
            force = self._strength * fisher * (p.detach() - start)
            p.grad = force if p.grad is None else p.grad + force
        return facts


def build(setup: Setup) -> Method:
    """Options: ``anchors_per_step``, ``strength``."""
    return ElasticWeights(setup, **setup.options)
