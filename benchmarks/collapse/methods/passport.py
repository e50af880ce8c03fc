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
from safeopt.passport.guard import PassportGuard


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
        self.spent.forward_rows += 2 * len(setup.anchors)  # inputs of matrices, rows of tables
        self._guard = guard
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
    anchors = setup.anchors if half is None else half_of(setup.anchors, half)
    passport = Passport.measure(setup.model, anchors, **settings)
    if random:
        draw = torch.Generator().manual_seed(setup.seed)
        sizes = {name: len(p) for name, p in setup.model.named_parameters()}
        passport = replace(passport, subspace=randomised(passport.inputs, sizes, draw))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.passport.safetensors"
        passport.save(path)
        return PassportGuard.from_passport(setup.model, path)


def half_of(anchors: Anchors, half: int) -> Anchors:
    """The even (0) or the odd (1) anchors."""
    return Anchors(*(tuple(f[half::2]) for f in vars(anchors).values()))


def randomised(
    subspace: InputSubspace, sizes: Mapping[str, int], draw: torch.Generator
) -> InputSubspace:
    """Random bases of the same ranks, and as many other embedding rows.

    Args:
        subspace: gives the ranks.
        sizes: rows of every parameter, by name.
        draw: source of the randomness.
    """
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
