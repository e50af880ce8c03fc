"""AdamW whose steps are as short as a guarded run's: does the guard merely move less?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.collapse.methods.base import (
    Displacement,
    Method,
    Setup,
    Training,
    norm,
    plain_adamw,
)
from benchmarks.collapse.suite import Batch


class NormMatched(Training):
    """AdamW with every step scaled to a given norm.

    Args:
        setup: the run.
        norms: mean step norm in each window of ``run.log_every`` steps of the guarded run.
    """

    def __init__(self, setup: Setup, norms: Sequence[float]) -> None:
        super().__init__(setup, plain_adamw(setup))
        self._norms, self._window, self._steps = norms, setup.run.log_every, 0
        self._displacement = Displacement(setup.model)

    def step(self, batch: Batch) -> dict[str, float]:
        """One AdamW step, then scaled."""
        self._displacement.start()
        facts = super().step(batch)
        taken = self._displacement.taken()
        wanted = self._norms[self._steps // self._window]
        scale = wanted / max(norm(taken), 1e-30)
        torch._foreach_mul_(taken, scale)
        self._displacement.replace(taken)
        self._steps += 1
        return facts | {"step_norm": wanted, "step_scale": scale}


def build(setup: Setup) -> Method:
    """Steps as long as those of ``options["like"]`` (``method/variant``) in its result."""
    method, variant = setup.options["like"].split("/")
    log = setup.earlier(method, variant)["log"]
    return NormMatched(setup, log["step_norm"])
