"""L2 to the start: a spring between the weights and the aligned weights.

Source: L2-SP (Li et al. 2018, arXiv 1802.01483): L = L_task + lambda / 2 ||theta - theta*||^2;
lambda of 0.001 to 1 was searched there, 0.1 was usual.

Fidelity: exact, as a term of the loss (so that AdamW scales it like the rest). No safety data.
"""

from __future__ import annotations

from benchmarks.collapse.methods.base import Method, Setup, Training, plain_adamw
from benchmarks.collapse.methods.vectors import copied, pull
from benchmarks.collapse.suite import Batch


class Spring(Training):
    """Gradient g + strength (theta - theta*).

    Args:
        setup: the run.
        strength: lambda.
    """

    def __init__(self, setup: Setup, strength: float = 0.1) -> None:
        super().__init__(setup, plain_adamw(setup))
        self._strength, self._start = strength, copied(self.parameters)

    def gradients(self, batch: Batch) -> dict[str, float]:
        """Gradient of the task loss and the spring."""
        facts = super().gradients(batch)
        pull(self.parameters, self._start, self._strength)
        return facts


def build(setup: Setup) -> Method:
    """Options: ``strength``."""
    return Spring(setup, **setup.options)
