"""InputSubspace: every change of a matrix that acts on what the anchors feed into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.anchors import AnchorBatch, Anchors
from safeopt.geometry.coverage import Site, find_coverage
from safeopt.geometry.inputs import (
    LARGEST_RANK,
    InputBasis,
    Positions,
    captured,
    recorded_ids,
    second_moments,
    shared_inputs,
    weighted_batches,
)
from safeopt.geometry.subspace import InputPiece, Piece, RowsPiece, WholePiece, remove_pieces_

# Second moments are held for so many matrices at a time as fit; further ones cost another pass.
_MOMENT_BYTES = 1 << 30
DIMS = {"linear": 1, "conv1d": 0}  # along which dimension of the parameter inputs run


@dataclass(frozen=True)
class InputSubspace:
    """Changes that the anchors would notice, matrix by matrix: P s = s X X^T.

    X is an orthonormal basis of what the anchors feed into the matrix. A step without that part
    leaves the matrix's outputs on the anchors alone at *any* length, not just to first order; if
    X holds all inputs of all matrices, the anchors' logits cannot change. Embedding tables keep
    the rows of the anchors' tokens; norms, scales and biases, whose every change acts on every
    input, are held. Both can be left free.

    Attributes:
        bases: X by basis name, (n, r), fp32; matrices that read one input share a basis.
        reads: parameter name to the basis of its inputs and the dimension along which they run.
        rows: parameter name to the embedding rows that are held.
        held: parameters that do not move at all.
        energies: by basis name, shares of the input energy per direction, largest first, (n,).
    """

    bases: Mapping[str, Tensor]
    reads: Mapping[str, tuple[str, int]]
    rows: Mapping[str, Tensor]
    held: tuple[str, ...]
    energies: Mapping[str, Tensor]

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        anchors: Anchors,
        *,
        indices: Sequence[int] | None = None,
        energy: float = 0.95,
        rank: int | None = LARGEST_RANK,
        positions: Positions = "all",
        normalise: bool = True,
        hold_rows: bool = True,
        hold_small: bool = True,
        batch_size: int = 8,
    ) -> InputSubspace:
        """Measure the bases with forward passes alone.

        Args:
            model: the aligned model, unwrapped; all its trainable parameters are looked at.
            anchors: examples whose behaviour must stay.
            indices: the anchors to use; all by default.
            energy: share of every matrix's input energy that its basis holds, in (0, 1].
            rank: most directions per basis; None sets no limit.
            positions: tokens that count, see `safeopt.geometry.inputs.token_weights`.
            normalise: give every token unit length before energies are counted.
            hold_rows: hold the embedding rows of the anchors' tokens.
            hold_small: hold norms, scales and biases.
            batch_size: anchors per forward pass.

        Raises:
            ValueError: ``energy`` out of range, or modules whose tokens cannot be told apart.
        """
        if not 0 < energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {energy}")
        sites = find_coverage(model).sites
        chosen = range(len(anchors)) if indices is None else indices
        batches = weighted_batches(model, anchors, chosen, positions, batch_size)
        matrices = [s for s in sites if s.rule in DIMS and "weight" in s.parameters]
        shared = shared_inputs(model, matrices, batches[-1][0])
        found = {
            name: basis
            for group in grouped([s for s in matrices if shared.get(s.name) == s.name], _inputs_of)
            for name, basis in _bases(model, group, batches, energy, rank, normalise)
        }
        return cls(
            bases={name: basis.vectors for name, basis in found.items()},
            reads={
                s.parameters["weight"]: (shared[s.name], DIMS[s.rule])
                for s in matrices
                if s.name in shared
            },
            rows=recorded_ids(model, _tables(sites), batches) if hold_rows else {},
            held=_small_parameters(sites) if hold_small else (),
            energies={name: basis.energies for name, basis in found.items()},
        )

    @property
    def nbytes(self) -> int:
        """Bytes held by bases and rows."""
        tensors = (*self.bases.values(), *self.rows.values())
        return sum(t.numel() * t.element_size() for t in tensors)

    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """Per-parameter projectors; a tied embedding has two, which commute."""
        found: dict[str, tuple[Piece, ...]] = {name: (WholePiece(),) for name in self.held}
        for name, (key, dim) in self.reads.items():
            found[name] = (InputPiece(self.bases[key], dim),)
        for name, ids in self.rows.items():
            found[name] = (*found.get(name, ()), RowsPiece(ids))
        return found

    def remove_(self, step: Mapping[str, Tensor]) -> None:
        """Write s <- s - P s in place; absent parameters do not move."""
        remove_pieces_(self.pieces(), step)

    def spectrum(self) -> Tensor:
        """Energy shares of the kept directions of all bases, largest first, (k,)."""
        kept = [self.energies[name][: basis.shape[1]] for name, basis in self.bases.items()]
        return torch.cat([torch.zeros(0), *kept]).sort(descending=True).values

    def captured(
        self,
        model: nn.Module,
        anchors: Anchors,
        indices: Sequence[int],
        *,
        positions: Positions = "all",
        normalise: bool = True,
        batch_size: int = 8,
    ) -> Tensor:
        """Share of other anchors' input energy that the bases hold, mean over them, (N,)."""
        batches = weighted_batches(model, anchors, indices, positions, batch_size)
        sites = [s for s in find_coverage(model).sites if s.name in self.bases]
        return captured(model, sites, self.bases, batches, normalise=normalise)

    def to(self, device: torch.device) -> InputSubspace:
        """The same subspace on ``device``."""
        bases = {name: basis.to(device) for name, basis in self.bases.items()}
        return replace(self, bases=bases, rows={n: ids.to(device) for n, ids in self.rows.items()})

    def layout(self) -> dict[str, Any]:
        """What is not a tensor, for a file's header."""
        reads = {name: list(read) for name, read in self.reads.items()}
        return {"reads": reads, "held": list(self.held)}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, for a file."""
        groups = {"basis": self.bases, "rows": self.rows, "energy": self.energies}
        return {f"{g}/{name}": t for g, tensors in groups.items() for name, t in tensors.items()}

    @classmethod
    def from_tensors(
        cls, layout: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> InputSubspace:
        """Rebuild a subspace from `layout` and `tensors`."""
        reads = {name: (str(key), int(dim)) for name, (key, dim) in layout["reads"].items()}
        bases, rows, energies = (tensors_of(tensors, kind) for kind in ("basis", "rows", "energy"))
        return cls(bases, reads, rows, tuple(layout["held"]), energies)


def tensors_of(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Those that a file calls ``kind/name``, by name."""
    prefix = f"{kind}/"
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _tables(sites: Sequence[Site]) -> list[Site]:
    return [s for s in sites if s.rule == "embedding"]


def _small_parameters(sites: Sequence[Site]) -> tuple[str, ...]:
    """Norms, scales and the biases of matrices."""
    names = [
        name
        for site in sites
        for local, name in site.parameters.items()
        if site.rule == "small" or (site.rule in DIMS and local == "bias")
    ]
    return tuple(dict.fromkeys(names))


def _inputs_of(site: Site) -> int:
    return int(site.module.weight.shape[DIMS[site.rule]])  # type: ignore[index]


def grouped(sites: Sequence[Site], width: Callable[[Site], int]) -> Iterator[list[Site]]:
    """Sites in order, as many at a time as their moments (width x width) fit in memory."""
    group: list[Site] = []
    used = 0
    for site in sites:
        size = 4 * width(site) ** 2
        if group and used + size > _MOMENT_BYTES:
            yield group
            group, used = [], 0
        group.append(site)
        used += size
    if group:
        yield group


def _bases(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[tuple[AnchorBatch, Tensor]],
    energy: float,
    rank: int | None,
    normalise: bool,
) -> Iterator[tuple[str, InputBasis]]:
    moments = second_moments(model, sites, batches, normalise=normalise)
    for name in list(moments):
        yield name, InputBasis.of(moments.pop(name), energy, rank)
