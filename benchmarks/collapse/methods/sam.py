"""SAM: the gradient at the worst point of a small ball.

Source: Sharpness-Aware Minimization (Foret et al. 2021, arXiv 2010.01412): follow the gradient at
theta + rho g / ||g||; rho 0.05. As a keeper of safety: When Safety Routing Breaks (2026), with the
adaptive form of Kwon et al. 2021 (arXiv 2102.11600), e = rho T^2 g / ||T g||, T = |theta|.

Fidelity: exact, one norm over all weights, AdamW as the base optimizer. Two passes over the task
rows, no safety data.
"""

from __future__ import annotations

import torch

from benchmarks.collapse.methods.base import Method, Setup, Training, norm, plain_adamw
from benchmarks.collapse.methods.vectors import copied, take_gradients
from benchmarks.collapse.suite import Batch


class SharpnessAware(Training):
    """AdamW on the gradient at the ascent point.

    Args:
        setup: the run.
        rho: radius of the ball.
        adaptive: measure the ball in units of the weights.
    """

    def __init__(self, setup: Setup, rho: float = 0.05, adaptive: bool = False) -> None:
        super().__init__(setup, plain_adamw(setup))
        self._rho, self._adaptive = rho, adaptive

    def gradients(self, batch: Batch) -> dict[str, float]:
        """Climb, take the gradient, come back."""
        facts = super().gradients(batch)
        weights = copied(self.parameters)
        self._climb(take_gradients(self.parameters))
        super().gradients(batch)
        with torch.no_grad():
            for p, weight in zip(self.parameters, weights, strict=True):
                p.copy_(weight)
        return facts

    @torch.no_grad()
    def _climb(self, gradients: list[torch.Tensor]) -> None:
        if self._adaptive:
            scaled = [p.abs() * g for p, g in zip(self.parameters, gradients, strict=True)]
            gradients = [p.abs() * s for p, s in zip(self.parameters, scaled, strict=True)]
        else:
            scaled = gradients
        length = max(norm(scaled), 1e-12)
        for p, g in zip(self.parameters, gradients, strict=True):
            p.add_(g, alpha=self._rho / length)


def build(setup: Setup) -> Method:
    """Options: ``rho``, ``adaptive``."""
    return SharpnessAware(setup, **setup.options)
