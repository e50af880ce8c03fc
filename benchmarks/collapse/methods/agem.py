"""A-GEM: no step may oppose the average gradient of the memory.

Source: Efficient Lifelong Learning with A-GEM (Chaudhry et al. 2019, arXiv 1812.00420): with g the
task gradient and r that of a batch from memory, follow g - min(0, <g, r>) / <r, r> r.

Fidelity: exact; the memory is the anchor pool and r the gradient of the anchors' reply NLL. The
projected gradient goes into AdamW before its moments, as in the authors' code. It has no strength
of its own.
"""

from __future__ import annotations

from benchmarks.collapse.methods.anchored import AnchorBudget, inputs
from benchmarks.collapse.methods.base import Method, Setup, Training, plain_adamw
from benchmarks.collapse.methods.vectors import set_gradients, take_gradients, without_conflict
from benchmarks.collapse.suite import Batch


class AveragedMemory(Training):
    """AdamW on the task gradient without what opposes the anchors' gradient.

    Args:
        setup: the run.
        anchors_per_step: the budget.
    """

    def __init__(self, setup: Setup, anchors_per_step: float) -> None:
        super().__init__(setup, plain_adamw(setup))
        self._budget = AnchorBudget(setup, anchors_per_step, self.spent)

    def gradients(self, batch: Batch) -> dict[str, float]:
        """The projected task gradient."""
        facts = super().gradients(batch)
        anchors = self._budget.next()
        if anchors is None:
            return facts
        task = take_gradients(self.parameters)
        self.model(**inputs(anchors)).loss.backward()
        memory = take_gradients(self.parameters)
        set_gradients(self.parameters, without_conflict(task, memory))
        return facts


def build(setup: Setup) -> Method:
    """Options: ``anchors_per_step``."""
    return AveragedMemory(setup, **setup.options)
