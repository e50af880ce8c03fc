"""The tangent move against a random subspace of equal rank: is it the subspace that helps?"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.collapse.methods.base import (
    Displacement,
    Method,
    Setup,
    Training,
    norm,
    plain_adamw,
)
from benchmarks.collapse.suite import Batch


class RandomSubspace(Training):
    """AdamW whose steps have ``rank`` random directions removed, redrawn every few steps.

    Args:
        setup: the run.
        rank: dimensions removed.
        refresh_every: steps between two draws.
    """

    def __init__(self, setup: Setup, rank: int, refresh_every: int) -> None:
        super().__init__(setup, plain_adamw(setup))
        self._rank, self._period, self._steps = rank, refresh_every, 0
        self._draw = torch.Generator().manual_seed(setup.seed)
        self._displacement = Displacement(setup.model)
        self._basis = torch.empty(0)

    def step(self, batch: Batch) -> dict[str, float]:
        """One AdamW step s, then s - R (Rᵀ R)⁻¹ Rᵀ s."""
        if self._steps % self._period == 0:
            self._basis = self._random_basis()
        self._steps += 1
        self._displacement.start()
        facts = super().step(batch)
        taken = self._displacement.taken()
        step = torch.cat([t.flatten() for t in taken])
        gram = self._basis.T @ self._basis
        kept = step - self._basis @ torch.linalg.solve(gram, self._basis.T @ step)
        self._displacement.replace(_like(kept, taken))
        length = float(kept.norm())
        return facts | {"step_norm": length, "removed": 1 - length / norm(taken)}

    def _random_basis(self) -> Tensor:
        # Normal draws as they are: a QR of them would need twice the memory.
        size = sum(p.numel() for p in self._displacement.parameters)
        return torch.randn(size, self._rank, generator=self._draw)


def _like(flat: Tensor, shapes: list[Tensor]) -> list[Tensor]:
    parts = flat.split([t.numel() for t in shapes])
    return [part.view_as(t) for part, t in zip(parts, shapes, strict=True)]


def build(setup: Setup) -> Method:
    """Options: ``rank`` and ``refresh_every``."""
    return RandomSubspace(setup, **setup.options)
