"""KroneckerSubspace: changes of matrices on a grid of output and input directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.anchors import Anchors
from safeopt.geometry.capture import CapturedCall, capture
from safeopt.geometry.coverage import Site, device_of, find_coverage
from safeopt.geometry.gradient_sketch import GradientSketch
from safeopt.geometry.input_subspace import DIMS, InputSubspace, grouped, tensors_of
from safeopt.geometry.inputs import LARGEST_RANK, InputBasis, count_for
from safeopt.geometry.subspace import GridPiece, Piece, remove_pieces_, removed_by
from safeopt.losses import reply_nll

# Wider outputs (vocabularies) have no basis: their matrices are held on the input side alone.
WIDEST = 16384


@dataclass(frozen=True)
class KroneckerSubspace:
    """The sharpest coordinates of every matrix in K-FAC's eigenbasis.

    With A the second moment of a matrix's inputs x and B that of the anchors' loss gradients d at
    its outputs, K-FAC (Martens and Grosse 2015, arXiv 1503.05671) takes the matrix's Gauss-Newton
    block for B (x) A. Its eigenvectors are u_i v_j^T with sharpness b_i a_j, and the largest of
    these are held: P s = U (M o (U^T s V)) V^T for an (out, in) matrix, M the mask. Unlike
    `InputSubspace` it lets outputs move that the anchors' losses do not depend on, so that the
    anchors are held to second order about the aligned weights and no longer at any length.

    Attributes:
        inputs: V of every matrix, embedding rows and what is held whole.
        outputs: U by parameter name, orthonormal, (m, a), fp32; matrices without it are held on the
            input side alone (embedding tables too, and outputs above ``WIDEST``).
        masks: M by parameter name, (a, r), bool.
        output_energies: by parameter name, shares of tr(B) per direction, largest first, (m,).
    """

    inputs: InputSubspace
    outputs: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    output_energies: Mapping[str, Tensor]

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        anchors: Anchors,
        *,
        indices: Sequence[int] | None = None,
        energy: float = 0.95,
        rank: int | None = LARGEST_RANK,
        grid: float = 0.95,
        batch_size: int = 8,
        **settings: Any,
    ) -> KroneckerSubspace:
        """Measure bases of inputs by forward passes, of output gradients by one backward more.

        Args:
            model: the aligned model, unwrapped.
            anchors: examples whose behaviour must stay.
            indices: the anchors to use; all by default.
            energy: share that each side's basis holds, in (0, 1].
            rank: most directions per basis; None sets no limit.
            grid: share of sum b_i a_j over the two bases that the mask holds, in (0, 1].
            batch_size: anchors per pass.
            settings: further keywords of `InputSubspace.measure`.

        Raises:
            ValueError: ``energy`` or ``grid`` out of range, or tokens that cannot be told apart.
        """
        if not 0 < grid <= 1:
            raise ValueError(f"grid must be in (0, 1], got {grid}")
        chosen = list(range(len(anchors)) if indices is None else indices)
        common: dict[str, Any] = {"energy": energy, "rank": rank, "batch_size": batch_size}
        inputs = InputSubspace.measure(model, anchors, indices=chosen, **common, **settings)
        sites = [s for s in find_coverage(model).sites if _has_grid(s, inputs)]
        bases: dict[str, InputBasis] = {}
        for group in grouped(sites, _outputs_of):
            for name, moment in _moments(model, group, anchors, chosen, batch_size).items():
                bases[name] = InputBasis.of(moment, energy, rank)
        masks = {}
        for name, basis in bases.items():
            key, _ = inputs.reads[name]
            shares = inputs.energies[key][: inputs.bases[key].shape[1]]
            masks[name] = sharpest(basis.energies[: basis.vectors.shape[1]], shares, grid)
        return cls(
            inputs,
            {name: basis.vectors for name, basis in bases.items()},
            masks,
            {name: basis.energies for name, basis in bases.items()},
        )

    @property
    def nbytes(self) -> int:
        """Bytes held by bases, masks and rows."""
        tensors = (*self.outputs.values(), *self.masks.values())
        return self.inputs.nbytes + sum(t.numel() * t.element_size() for t in tensors)

    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """Per-parameter projectors."""
        found = self.inputs.pieces()
        for name, basis in self.outputs.items():
            key, dim = self.inputs.reads[name]
            found[name] = (GridPiece(basis, self.inputs.bases[key], self.masks[name], dim),)
        return found

    def remove_(self, step: Mapping[str, Tensor]) -> None:
        """Write s <- s - P s in place; absent parameters do not move."""
        remove_pieces_(self.pieces(), step)

    def spectrum(self) -> Tensor:
        """Shares b_i a_j of the held coordinates of all grids, largest first, (k,)."""
        kept = [torch.zeros(0)]
        for name, mask in self.masks.items():
            key, _ = self.inputs.reads[name]
            rows, columns = mask.shape
            products = torch.outer(
                self.output_energies[name][:rows], self.inputs.energies[key][:columns]
            )
            kept.append(products[mask])
        return torch.cat(kept).sort(descending=True).values

    def captured(
        self, model: nn.Module, anchors: Anchors, indices: Sequence[int], **settings: Any
    ) -> Tensor:
        """Share of other anchors' squared gradient that the grids hold, (N,).

        Args:
            model: the model, unwrapped.
            anchors: the anchors.
            indices: those that were not fitted to.
            settings: of `measure`; gradients depend on none of them.
        """
        del settings
        pieces = self.pieces()
        coverage, shares = find_coverage(model), []
        shapes = {name: p.shape for name, p in model.named_parameters()}
        for i in indices:
            batch = anchors.batch([i]).to(device_of(model))
            sketch = GradientSketch.measure(
                model, coverage, batch, reply_nll, compression_rank=None
            )
            held = total = torch.zeros((), dtype=torch.float64, device=device_of(model))
            for name in self.outputs.keys() & sketch.blocks.keys():
                gradient = torch.stack([b.dense(shapes[name])[0] for b in sketch.blocks[name]])
                part = removed_by(pieces[name], gradient.sum(0))
                held = held + part.double().square().sum()
                total = total + gradient.sum(0).double().square().sum()
            shares.append(held / total.clamp(min=torch.finfo(torch.float64).tiny))
        return torch.stack(shares).float()

    def to(self, device: torch.device) -> KroneckerSubspace:
        """The same subspace on ``device``."""
        outputs = {name: basis.to(device) for name, basis in self.outputs.items()}
        masks = {name: mask.to(device) for name, mask in self.masks.items()}
        return replace(self, inputs=self.inputs.to(device), outputs=outputs, masks=masks)

    def layout(self) -> dict[str, Any]:
        """What is not a tensor, for a file's header."""
        return self.inputs.layout()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, for a file."""
        groups = {"output": self.outputs, "mask": self.masks, "sharpness": self.output_energies}
        own = {f"{g}/{name}": t for g, tensors in groups.items() for name, t in tensors.items()}
        return self.inputs.tensors() | own

    @classmethod
    def from_tensors(
        cls, layout: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> KroneckerSubspace:
        """Rebuild a subspace from `layout` and `tensors`."""
        parts = (tensors_of(tensors, kind) for kind in ("output", "mask", "sharpness"))
        return cls(InputSubspace.from_tensors(layout, tensors), *parts)


def sharpest(outputs: Tensor, inputs: Tensor, share: float) -> Tensor:
    """Mask of the fewest coordinates b_i a_j that hold ``share`` of their sum, (a, r), bool."""
    products = torch.outer(outputs, inputs).flatten()
    values, order = products.sort(descending=True)
    mask = torch.zeros_like(products, dtype=torch.bool)
    mask[order[: count_for(values, share)]] = True
    return mask.view(len(outputs), len(inputs))


def _has_grid(site: Site, inputs: InputSubspace) -> bool:
    """A table's rows and a basis of outputs do not commute, so that a tied head has no grid."""
    name = site.parameters.get("weight", "")
    is_read = site.rule in DIMS and name in inputs.reads
    return is_read and name not in inputs.rows and _outputs_of(site) <= WIDEST


def _outputs_of(site: Site) -> int:
    return int(site.module.weight.shape[1 - DIMS[site.rule]])  # type: ignore[index]


def _moments(
    model: nn.Module,
    sites: Sequence[Site],
    anchors: Anchors,
    indices: Sequence[int],
    batch_size: int,
) -> dict[str, Tensor]:
    """Second moments of the loss gradients at the outputs, each anchor's scaled to trace 1."""
    moments: dict[str, Tensor] = {}
    for start in range(0, len(indices), batch_size):
        batch = anchors.batch(indices[start : start + batch_size]).to(device_of(model))
        _, calls = capture(model, tuple(sites), batch, reply_nll)
        for site, made in zip(sites, calls, strict=True):
            for tokens in _unit_anchors(made):
                name, outer = site.parameters["weight"], tokens.T @ tokens
                moments[name] = moments[name].add_(outer) if name in moments else outer
    return moments


def _unit_anchors(calls: Sequence[CapturedCall]) -> Iterator[Tensor]:
    """Every anchor's output gradients (t, m) in fp32 or better, with squares that sum to 1."""
    if not calls:
        return
    joined = torch.cat([c.gradient.flatten(1, -2) for c in calls], dim=1)
    joined = joined.to(torch.promote_types(joined.dtype, torch.float32))
    for tokens in joined:
        size = tokens.norm()
        if float(size) > 0:
            yield tokens / size
