"""Which directions should a passport of a given size hold? Rules compared at equal numbers held.

- ``threshold``: those that hold a share ``energy`` of every matrix's input energy, as a passport
  does; the other rules hold as many floats.
- ``sharpness``: the largest lambda_j = 1/N sum_i ||G_i v_j||^2, the anchors' Fisher energy of
  changes along v_j, over all matrices together.
- ``coupled``: the largest lambda_j gamma_j^2 with gamma_j = ||(H g) v_j||, g and H the gradient and
  Hessian of the task's loss: rank goes where second order will push.
- ``met``: the same with ||g v_j||, where first order pushes.

The last two need task data at the time of measuring, which a passport's owner does not have: here
they are given the first training batch, and so have more than the first two.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.collapse.methods.base import Method, Setup, Spending
from benchmarks.collapse.methods.passport import Passported
from benchmarks.collapse.suite import Batch
from safeopt import Anchors, GradientSketch
from safeopt.curvature import Hessian
from safeopt.geometry.blocks import LowRankBlock
from safeopt.geometry.coverage import find_coverage
from safeopt.geometry.input_subspace import InputSubspace
from safeopt.losses import reply_nll
from safeopt.passport.guard import PassportGuard

Rule = Literal["threshold", "sharpness", "coupled", "met"]
_AT_ONCE = 32

Vector = Mapping[str, Tensor]


def sharpness(model: nn.Module, anchors: Anchors, everything: InputSubspace) -> dict[str, Tensor]:
    """lambda_j of every direction, by basis."""
    found = {name: torch.zeros(v.shape[1]) for name, v in everything.bases.items()}
    coverage = find_coverage(model)
    for start in range(0, len(anchors), _AT_ONCE):
        batch = anchors.batch(range(start, min(start + _AT_ONCE, len(anchors))))
        sketch = GradientSketch.measure(model, coverage, batch, reply_nll, compression_rank=None)
        for parameter, (name, _) in everything.reads.items():
            for block in sketch.blocks.get(parameter, ()):
                if isinstance(block, LowRankBlock):
                    along = block.left.mT @ (block.right @ everything.bases[name])
                    found[name] += along.square().sum((0, 1)) / len(anchors)
    return found


def pushed(direction: Vector, everything: InputSubspace) -> dict[str, Tensor]:
    """Squared size along every v_j of a vector over parameters, by basis."""
    found = {name: torch.zeros(v.shape[1]) for name, v in everything.bases.items()}
    for parameter, (name, _) in everything.reads.items():
        found[name] += (direction[parameter] @ everything.bases[name]).square().sum(0)
    return found


def task_direction(model: nn.Module, batch: Batch, rule: Rule) -> dict[str, Tensor]:
    """H g for ``coupled``, g for ``met``."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = model(**batch).loss
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    gradient = dict(zip(parameters, gradients, strict=True))
    if rule == "met":
        return gradient
    hessian = Hessian(model, lambda m: m(**batch).loss, method="finite_difference")
    return hessian.matvec(gradient)


def best(everything: InputSubspace, scores: Mapping[str, Tensor], floats: int) -> InputSubspace:
    """The directions with the highest scores per float, as many as fit."""
    entries = [
        (score / len(everything.bases[name]), name, j)
        for name, own in scores.items()
        for j, score in enumerate(own.tolist())
    ]
    chosen: dict[str, list[int]] = {name: [] for name in everything.bases}
    for _, name, j in sorted(entries, reverse=True):
        width = len(everything.bases[name])
        if width <= floats:
            chosen[name].append(j)
            floats -= width
    bases = {name: everything.bases[name][:, sorted(js)] for name, js in chosen.items()}
    return replace(everything, bases=bases)


def ranked(setup: Setup, batch: Batch, rule: Rule, energy: float) -> InputSubspace:
    """The subspace that a rule chooses."""
    usual = InputSubspace.measure(setup.model, setup.anchors, energy=energy)
    if rule == "threshold":
        return usual
    everything = InputSubspace.measure(setup.model, setup.anchors, energy=1.0)
    scores = sharpness(setup.model, setup.anchors, everything)
    if rule != "sharpness":
        weights = pushed(task_direction(setup.model, batch, rule), everything)
        scores = {name: own * weights[name] for name, own in scores.items()}
    return best(everything, scores, sum(basis.numel() for basis in usual.bases.values()))


class Ranked:
    """SafeAdamW under a subspace that is chosen when the first batch is there.

    Args:
        setup: the run.
        rule: see the module.
        energy: sets the size.
    """

    def __init__(self, setup: Setup, rule: Rule, energy: float = 0.95) -> None:
        self._setup, self._rule, self._energy = setup, rule, energy
        self._method: Passported | None = None
        self.spent = Spending()

    def step(self, batch: Batch) -> dict[str, float]:
        """One guarded step."""
        if self._method is None:
            subspace = ranked(self._setup, batch, self._rule, self._energy)
            guard = PassportGuard(self._setup.model, subspace.pieces())
            self._method = Passported(self._setup, guard)
            self.spent = self._method.spent
        return self._method.step(batch)

    def deployed(self) -> AbstractContextManager[None]:
        """The trained weights as they are."""
        return nullcontext()


def build(setup: Setup) -> Method:
    """Options: ``rule``, ``energy``."""
    return Ranked(setup, **setup.options)
