"""Frame: the anchors' gradients at one refresh, and the subspace that they span."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safeopt.distributed import Parameters, Ranks, Share
from safeopt.geometry import sharding
from safeopt.geometry.gradient_sketch import GradientSketch
from safeopt.geometry.moves import Eigenbasis, Retraction


@dataclass(frozen=True)
class Frame:
    """What a refresh measures, until the next one.

    Attributes:
        anchors: which anchors were looked at, N of them.
        names: the parameters that trained then, those that no rule covers among them.
        sketch: their gradients G, of the rows of the parameters that this process holds.
        gram: K = G G^T over whole parameters, (N, N).
        eigenbasis: the eigenpairs of K that are kept.
        has_silence: some parameter has no gradient at all.
        is_whole: the sketch still is that of whole parameters, as a checkpoint holds it.
    """

    anchors: tuple[int, ...]
    names: frozenset[str]
    sketch: GradientSketch
    gram: Tensor
    eigenbasis: Eigenbasis
    has_silence: bool
    is_whole: bool = False

    @classmethod
    def measure(
        cls,
        anchors: list[int],
        names: frozenset[str],
        measure: Callable[[Share], GradientSketch],
        ranks: Ranks,
        parameters: Callable[[], Parameters],
        keep: Callable[[Tensor], Eigenbasis],
    ) -> Frame:
        """Have every process measure its share of the anchors, and put the shares together.

        Args:
            anchors: which anchors.
            names: the parameters that train.
            measure: sketches a share of them.
            ranks: the processes.
            parameters: gives the model's parameters as they are after measuring.
            keep: gives the eigenpairs of K to keep.

        Raises:
            FloatingPointError: an anchor's loss or gradient is not finite.
        """
        share = ranks.share(len(anchors))
        part = ranks.together(lambda: measure(share))
        sketch = sharding.gather(part, share, ranks, parameters())
        gram, has_silence = sharding.gram(sketch, ranks, parameters())
        return cls(tuple(anchors), names, sketch, gram, keep(gram), has_silence)

    def placed(self, parameters: Callable[[], Parameters]) -> Frame:
        """The frame of the rows that this process holds; every step asks."""
        if not self.is_whole:
            return self
        return replace(self, sketch=sharding.keep(self.sketch, parameters()), is_whole=False)

    def blank(self, ranks: Ranks, parameters: Parameters) -> Callable[[], sharding.Coordinates]:
        """A maker of empty coordinates over this frame."""
        counted = ranks.counted(parameters)
        return partial(sharding.Coordinates, self.sketch, ranks, counted)

    def leak_of(self, coefficients: Tensor, retraction: Retraction, along: Tensor) -> float:
        """Return ||U^T d|| of a stored change d, apart from an intended retraction.

        Args:
            coefficients: G d, (N,).
            retraction: the retraction that is part of d.
            along: G m, (N,).
        """
        intended = retraction.along * along - self.gram @ retraction.weights
        return self.eigenbasis.component_norm(coefficients - intended)

    def spectrum(self) -> Tensor:
        """Eigenvalues of the empirical Fisher G^T G / N, largest first, (N,)."""
        eigenvalues: Tensor = torch.linalg.eigvalsh(self.gram)
        return eigenvalues.flip(0).clamp(min=0) / len(self.gram)

    def state_dict(self, ranks: Ranks, parameters: Parameters) -> dict[str, Any]:
        """The same on every process; with sharded parameters a collective."""
        sketch = self.sketch
        if not self.is_whole:
            sketch = sharding.whole(sketch, ranks, parameters)
        return {
            "anchors": list(self.anchors),
            "names": sorted(self.names),
            "sketch": sketch.state_dict(),
            "gram": self.gram,
            "has_silence": self.has_silence,
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], keep: Callable[[Tensor], Eigenbasis], device: torch.device
    ) -> Frame:
        """Rebuild a frame from `state_dict`, with whole parameters until it is `placed`."""
        sketch, gram = GradientSketch.from_state_dict(state["sketch"]), state["gram"].to(device)
        anchors, names = tuple(state["anchors"]), frozenset(state.get("names", ()))
        silence = state["has_silence"]
        return cls(anchors, names, sketch.to(device), gram, keep(gram), silence, True)
