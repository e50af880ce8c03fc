"""SafeAdamW: AdamW held on the safety level set by a guard."""

from __future__ import annotations

from benchmarks.collapse.methods.base import Displacement, Method, Setup, Training, norm
from benchmarks.collapse.suite import Batch
from safeopt import Guard, SafeAdamW


class Safe(Training):
    """SafeAdamW with the guard's own account of every step."""

    def __init__(self, setup: Setup, guard: Guard) -> None:
        optimizer = SafeAdamW(
            setup.model.named_parameters(),
            lr=setup.run.lr,
            weight_decay=setup.run.weight_decay,
            guard=guard,
        )
        super().__init__(setup, optimizer)
        self._guard = guard
        self.spent.forward_rows += len(setup.anchors)  # their losses at the aligned model
        self._displacement = Displacement(setup.model)

    def step(self, batch: Batch) -> dict[str, float]:
        """One guarded step; facts are the loss, the step's norm and the guard's metrics."""
        self._displacement.start()
        facts = super().step(batch)
        if self._guard.basis_age == 1:  # the step began with a refresh
            self.spent.anchor_rows += self._guard.anchors_per_refresh
        return facts | {"step_norm": norm(self._displacement.taken())} | self._guard.metrics()


def build(setup: Setup) -> Method:
    """Options are the keywords of :class:`safeopt.Guard`."""
    return Safe(setup, Guard(setup.model, setup.anchors, seed=setup.seed, **setup.options))
