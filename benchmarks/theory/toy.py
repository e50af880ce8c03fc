"""A smooth toy: quadratic anchor losses and a quadratic task, every constant known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.geometry import DenseSubspace

SIZE, ANCHORS = 60, 4


@dataclass
class Toy:
    """l_i = a_i . x + 1/2 x^T Q_i x and L = g . x + 1/2 x^T H x, in float64, from x = 0.

    Args:
        seed: draws everything.
        overlap: ||P g|| / ||g|| with P the projector on the a_i; 0 is the paper's second condition.
        curved: False sets Q_i = 0: the level set is flat and its normals never turn.
    """

    seed: int
    overlap: float = 0.0
    curved: bool = True

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        normals = torch.linalg.qr(normal(SIZE, ANCHORS)).Q.T
        self.normals = normals * torch.linspace(1, 3, ANCHORS, dtype=torch.float64)[:, None].sqrt()
        bends, task = normal(ANCHORS, SIZE, SIZE), normal(SIZE, SIZE)
        self.bends = (bends + bends.transpose(1, 2)) / (2 * SIZE) ** 0.5
        self.bends *= float(self.curved)
        self.hessian = (task + task.T) / (2 * SIZE) ** 0.5
        inside, outside = normals.T @ normal(ANCHORS), normal(SIZE)
        outside = outside - normals.T @ (normals @ outside)
        self.slope = self.overlap * inside / inside.norm()
        self.slope += (1 - self.overlap**2) ** 0.5 * outside / outside.norm()
        self.x = torch.zeros(SIZE, dtype=torch.float64)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The one vector x."""
        return {"x": self.x}

    def losses(self) -> Tensor:
        """Anchor losses, (N,)."""
        losses: Tensor = self.normals @ self.x + 0.5 * (self.bends @ self.x) @ self.x
        return losses

    def gradients(self) -> DenseSubspace:
        """a_i + Q_i x."""
        return DenseSubspace({"x": self.normals + self.bends @ self.x})

    def velocity(self) -> dict[str, Tensor]:
        """-(g + H x)."""
        return {"x": -(self.slope + self.hessian @ self.x)}
