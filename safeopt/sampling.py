"""Which anchors the next refresh looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from safeopt.anchors import Kind


class AnchorSampler:
    """Draws anchors without replacement, each kind in proportion, reshuffled when used up.

    It owns its random generator, so that drawing leaves the global one alone.
    """

    def __init__(self, kinds: Sequence[Kind], per_draw: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._pools = [
            pool
            for kind in ("refuse", "comply")
            if (pool := [i for i, k in enumerate(kinds) if k == kind])
        ]
        self._shares = _shares([len(pool) for pool in self._pools], min(per_draw, len(kinds)))
        self._queues: list[list[int]] = [[] for _ in self._pools]

    def draw(self) -> list[int]:
        """Return the indices of the next anchors."""
        return [i for which, share in enumerate(self._shares) for i in self._take(which, share)]

    def _take(self, which: int, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            if not self._queues[which]:
                order = torch.randperm(len(self._pools[which]), generator=self._generator)
                fresh = [self._pools[which][i] for i in order.tolist()]
                self._queues[which] = sorted(fresh, key=taken.__contains__)  # those taken last
            taken.append(self._queues[which].pop(0))
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Position in every pool and the generator's state."""
        queues = [list(queue) for queue in self._queues]
        return {"generator": self._generator.get_state(), "queues": queues}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._generator.set_state(state["generator"])
        self._queues = [list(queue) for queue in state["queues"]]


def _shares(sizes: list[int], total: int) -> list[int]:
    """Split ``total`` draws in proportion to ``sizes``, at least one each where possible."""
    if len(sizes) == 1 or total < len(sizes):
        return [total, *([0] * (len(sizes) - 1))]
    first = min(max(1, round(total * sizes[0] / sum(sizes))), total - 1)
    return [min(first, sizes[0]), min(total - first, sizes[1])]
