"""SafeAdamW under a passport: no anchors while training."""

from __future__ import annotations

from benchmarks.collapse.methods.base import Displacement, Method, Setup, Training, norm
from benchmarks.collapse.suite import Batch
from safeopt import SafeAdamW
from safeopt.geometry.input_subspace import InputSubspace
from safeopt.passport_guard import PassportGuard


class Passported(Training):
    """SafeAdamW whose guard holds a subspace measured before training.

    Args:
        setup: the run.
        guard: the passport's guard.
    """

    def __init__(self, setup: Setup, guard: PassportGuard) -> None:
        optimizer = SafeAdamW(
            setup.model.named_parameters(),
            lr=setup.run.lr,
            weight_decay=setup.run.weight_decay,
            guard=guard,
        )
        super().__init__(setup, optimizer)
        self._guard = guard
        self.spent.forward_rows += len(setup.anchors)  # the passport's measurement
        self._displacement = Displacement(setup.model)

    def step(self, batch: Batch) -> dict[str, float]:
        """One guarded step; facts are the loss, the step's norm and the guard's metrics."""
        self._displacement.start()
        facts = super().step(batch)
        return facts | {"step_norm": norm(self._displacement.taken())} | self._guard.metrics()


def build(setup: Setup) -> Method:
    """Options are the keywords of `InputSubspace.measure`."""
    subspace = InputSubspace.measure(setup.model, setup.anchors, **setup.options)
    return Passported(setup, PassportGuard(setup.model, subspace.pieces()))
