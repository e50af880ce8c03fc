"""AsFT: keep the adapters inside the alignment direction while they train.

Source: AsFT (2025, arXiv 2506.08473): L = L_task + lambda sum over layers ||(I - C) B A||_F^2 with
C = V V^T / ||V||_F of V = W_aligned - W_base; lambda 1.

Fidelity: B A is taken with the adapter's scale, as the change of the weight. Needs the model before
alignment, no safety data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.collapse.methods.alignment import alignment_matrices
from benchmarks.collapse.methods.base import Method, Setup, Training, plain_adamw
from benchmarks.collapse.suite import Batch


class AsFT(Training):
    """AdamW on the task loss plus the part of the change outside the alignment direction.

    Args:
        setup: the run.
        strength: lambda.
    """

    def __init__(self, setup: Setup, strength: float = 1.0) -> None:
        super().__init__(setup, plain_adamw(setup))
        self._strength, self._matrices = strength, alignment_matrices(setup)

    def penalty(self) -> Tensor:
        """Lambda sum ||(I - C) scale B A||_F^2."""
        outside = [a.change() - C @ a.change() for a, C in self._matrices]
        return self._strength * torch.stack([d.square().sum() for d in outside]).sum()

    def gradients(self, batch: Batch) -> dict[str, float]:
        """Gradient of the task loss and the penalty."""
        facts = super().gradients(batch)
        penalty = self.penalty()
        penalty.backward()
        return facts | {"penalty": penalty.item()}


def build(setup: Setup) -> Method:
    """Options: ``strength``."""
    return AsFT(setup, **setup.options)
