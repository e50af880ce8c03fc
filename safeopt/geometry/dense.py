"""DenseSubspace: G as a plain matrix. The truth in tests; small models only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.geometry.gradient_sketch import GradientSketch
from safeopt.geometry.subspace import EIGENVALUE_FLOOR, check_all_there


@dataclass(frozen=True)
class DenseSubspace:
    """The anchors' gradients G, materialised in float64.

    Attributes:
        gradients: parameter name to (N, *shape).
    """

    gradients: Mapping[str, Tensor]

    @classmethod
    def from_sketch(cls, sketch: GradientSketch, shapes: Mapping[str, torch.Size]) -> DenseSubspace:
        """Materialise a sketch; N x P floats."""
        dense = {
            name: torch.stack([b.dense(shapes[name]) for b in blocks]).sum(0).double()
            for name, blocks in sketch.blocks.items()
        }
        return cls(dense)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(g.numel() * g.element_size() for g in self.gradients.values())

    def matrix(self) -> Tensor:
        """Return G, (N, P), parameters in the order of `gradients`."""
        return torch.cat([g.flatten(1) for g in self.gradients.values()], dim=1)

    def gram(self) -> Tensor:
        """Return K = G G^T, (N, N)."""
        g = self.matrix()
        return g @ g.T

    def coefficients(self, step: Mapping[str, Tensor]) -> Tensor:
        """Return G s, (N,)."""
        return self.matrix() @ self._flat(step)

    def subtract_(self, step: Mapping[str, Tensor], weights: Tensor) -> None:
        """Write s -= G^T a in place."""
        for name, gradient in self.gradients.items():
            change = torch.tensordot(weights.double(), gradient, dims=1)
            step[name].copy_((step[name].double() - change).to(step[name].dtype))

    def remove_(
        self, step: Mapping[str, Tensor], rank: int | None = None, floor: float = EIGENVALUE_FLOOR
    ) -> None:
        """Write s <- s - U U^T s in place; arguments and errors of `GradientSketch.remove_`."""
        check_all_there(self.gradients, step)
        basis, flat = self.basis(rank, floor), self._flat(step)
        removed = (basis @ (basis.T @ flat)).split([step[n].numel() for n in self.gradients])
        for name, part in zip(self.gradients, removed, strict=True):
            step[name].copy_((step[name].double() - part.view_as(step[name])).to(step[name].dtype))

    def spectrum(self) -> Tensor:
        """Eigenvalues of G^T G / N, largest first, (N,)."""
        singular: Tensor = torch.linalg.svdvals(self.matrix())
        return singular.square() / len(self.matrix())

    def basis(self, rank: int | None = None, eigenvalue_floor: float = EIGENVALUE_FLOOR) -> Tensor:
        """Orthonormal basis U of the safety subspace, (P, k), by SVD of G."""
        _, singular, vectors = torch.linalg.svd(self.matrix(), full_matrices=False)
        keep = singular.square() > eigenvalue_floor * singular[0].square()
        basis: Tensor = vectors[keep][:rank].T
        return basis

    def leak(self, step: Mapping[str, Tensor], basis: Tensor) -> float:
        """Return ||U^T s|| / ||s||."""
        flat = self._flat(step)
        return float((basis.T @ flat).norm() / flat.norm())

    def _flat(self, step: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([step[name].flatten().double() for name in self.gradients])
