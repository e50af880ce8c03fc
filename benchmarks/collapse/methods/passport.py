"""SafeAdamW under a passport: no anchors while training."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.collapse.methods.base import Displacement, Method, Setup, Training, norm
from benchmarks.collapse.suite import Batch
from safeopt import Anchors, SafeAdamW
from safeopt.geometry.input_subspace import InputSubspace
from safeopt.passport import Passport
from safeopt.passport_guard import PassportGuard


class Passported(Training):
    """SafeAdamW whose guard holds a subspace measured before training.

    Args:
        setup: the run.
        guard: the passport's guard.
    """

    def __init__(self, setup: Setup, guard: PassportGuard) -> None:
        optimizer = SafeAdamW(
            setup.model.named_parameters(),
            lr=setup.run.lr,
            weight_decay=setup.run.weight_decay,
            guard=guard,
        )
        super().__init__(setup, optimizer)
        self.spent.forward_rows += len(setup.anchors)
        self._guard = guard
        self.spent.forward_rows += len(setup.anchors)  # the passport's measurement
        self._displacement = Displacement(setup.model)

    def step(self, batch: Batch) -> dict[str, float]:
        """One guarded step; facts are the loss, the step's norm and the guard's metrics."""
        self._displacement.start()
        facts = super().step(batch)
        return facts | {"step_norm": norm(self._displacement.taken())} | self._guard.metrics()


def measured(
    setup: Setup, half: int | None = None, random: bool = False, **settings: Any
) -> PassportGuard:
    """A guard from a passport's file, measured on the aligned model.

    Args:
        setup: the run.
        half: measure on the even (0) or odd (1) anchors alone.
        random: replace the bases by random ones of the same ranks, and the rows of the anchors'
            tokens by as many others: the control.
        settings: keywords of `safeopt.passport.Passport.measure`.
    """
    chosen = range(len(setup.anchors))[half::2] if half is not None else range(len(setup.anchors))
    anchors = Anchors(*(tuple(f[i] for i in chosen) for f in vars(setup.anchors).values()))
    passport = Passport.measure(setup.model, anchors, **settings)
    if random:
        draw = torch.Generator().manual_seed(setup.seed)
        sizes = {name: len(p) for name, p in setup.model.named_parameters()}
        passport = replace(passport, subspace=_randomised(passport.subspace, sizes, draw))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.passport.safetensors"
        passport.save(path)
        return PassportGuard.from_passport(setup.model, path)


def _randomised(
    subspace: InputSubspace, sizes: Mapping[str, int], draw: torch.Generator
) -> InputSubspace:
    bases = {
        name: torch.linalg.qr(torch.randn(basis.shape, generator=draw)).Q
        for name, basis in subspace.bases.items()
    }
    rows = {
        name: torch.randperm(sizes[name], generator=draw)[: len(ids)]
        for name, ids in subspace.rows.items()
    }
    return replace(subspace, bases=bases, rows=rows)


def build(setup: Setup) -> Method:
    """Options are the keywords of `measured`."""
    return Passported(setup, measured(setup, **setup.options))
