"""The guarded AdamW step on lists of parameters, by the operators of `safeopt_kernels`.

Two launches do every matrix, norm, bias and adapter of one dtype: the first steps and looks at the
steps through the anchors' factors, the second takes out what the guard wants out. It is
`safeopt.optim.reference` done another way, and held to it by tests. With ``rounding="nearest"``
the step is handed over in the weights, as there; the other roundings keep it in a buffer of the
size of the weights, so that the kernels round once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from safeopt.correction import LevelSetCorrection, StepGuard
from safeopt.distributed import local
from safeopt.geometry.blocks import Block, DenseBlock, LowRankBlock
from safeopt.geometry.sharding import Coordinates
from safeopt.guard import Guard
from safeopt.optim.reference import begin, in_own_precision
from safeopt.optim.storage import Precision
from safeopt_kernels import dispatch, ops, settings

_OPTIONS = ("amsgrad", "maximize")


def takes_lists(optimizer: Optimizer, guard: StepGuard, precision: Precision) -> bool:
    """Decide whether this step goes through the kernels; ``SAFEOPT_KERNELS`` has the last word.

    Raises:
        RuntimeError: kernels were asked for by name and cannot do this step.
    """
    wanted = dispatch.mode()
    if wanted == "reference":
        return False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    obstacle = _obstacle(optimizer, guard, precision, parameters)
    if obstacle is not None:
        if wanted != "auto":
            dispatch.raise_unmet(wanted, obstacle)
        return False
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    not_native = None if precision.rounding == "nearest" else f"it rounds no {precision.rounding}"
    local_ones = [local(p) for p in parameters]
    return dispatch.implementation(local_ones, gradients, not_native=not_native) != "reference"


def _obstacle(
    optimizer: Optimizer, guard: StepGuard, precision: Precision, parameters: list[Tensor]
) -> str | None:
    for option in _OPTIONS:
        if any(group[option] for group in optimizer.param_groups):
            return f"the kernels know no {option}=True"
    if not isinstance(guard, Guard):
        return f"a {type(guard).__name__} corrects matrices one by one"
    if any(p.grad is not None and local(p.grad).is_sparse for p in parameters):
        return "a gradient is sparse"
    if precision.rounding == "stochastic" and {p.dtype for p in parameters} != {torch.bfloat16}:
        return "stochastic rounding is for bfloat16 weights and some are of another dtype"
    return None


@in_own_precision
def listed_step(optimizer: AdamW, guard: StepGuard, precision: Precision) -> None:
    """Take one guarded AdamW step through the kernels.

    Raises:
        ValueError: a parameter does not belong to the guard's model.
        FloatingPointError: a gradient or an anchor loss is not finite. Weights and optimizer
            state are untouched.
    """
    parameters, correction = begin(optimizer, guard)
    assert isinstance(correction, LevelSetCorrection)
    lists = Lists(optimizer, parameters, correction, precision)
    start = time.perf_counter()
    lists.propose(guard.brake)
    correction.spent(time.perf_counter() - start)
    correction.finish(parameters, lists.write)


@dataclass
class Entry:
    """One parameter as the kernels see it.

    Attributes:
        name: in the guard's model.
        number: its place in the optimizer, part of the seed of stochastic rounding.
        parameter: the parameter.
        p: what this process holds of it, (rows, cols), sharing its memory.
        left: factors (N, q, rows).
        right: factors (N, q, cols).
        rest: the anchors' gradients that have no such factors, as those of embedding rows.
        step: the step, shaped as p, where it waits in a buffer; None where the weights hold it.
        state: the optimizer's state of the parameter, once it takes part in this step.
        t: number of the step; 0 without a gradient.
    """

    name: str
    number: int
    parameter: Tensor
    p: Tensor
    left: Tensor
    right: Tensor
    rest: tuple[Block, ...]
    step: Tensor | None = None
    state: dict[str, Any] = field(default_factory=dict)
    t: int = 0

    def like(self, tensor: Tensor) -> Tensor:
        """Another tensor of the parameter as (rows, cols)."""
        part, shape = local(tensor), self.p.shape
        return part if part.shape == shape else part.view(shape)

    def shaped(self, matrix: Tensor) -> Tensor:
        """A (rows, cols) matrix in the shape of the local parameter."""
        return matrix.view(local(self.parameter).shape)


class Lists:
    """All parameters of an optimizer during one step.

    Args:
        optimizer: an AdamW.
        parameters: its parameters by name.
        correction: what the guard does to the step.
        precision: rounding and dtype of the moments.
    """

    def __init__(
        self,
        optimizer: AdamW,
        parameters: Mapping[str, Tensor],
        correction: LevelSetCorrection,
        precision: Precision,
    ) -> None:
        self._optimizer, self._correction, self._precision = optimizer, correction, precision
        self._entries = {
            id(p): self._entry(name, number, p)
            for number, (name, p) in enumerate(parameters.items())
        }

    def _entry(self, name: str, number: int, parameter: Tensor) -> Entry:
        p, blocks = local(parameter), self._correction.blocks(name)
        low_rank = [b for b in blocks if isinstance(b, LowRankBlock)]
        dense = [b for b in blocks if isinstance(b, DenseBlock)]
        if low_rank:
            left, right = _joined([b.left for b in low_rank]), _joined([b.right for b in low_rank])
            rest = tuple(b for b in blocks if not isinstance(b, LowRankBlock))
            matrix = p.view(len(p), math.prod(p.shape[1:]))  # a shard may have no rows
            return Entry(name, number, parameter, matrix, left, right, rest)
        matrix, one = p.view(1, -1), self._ones
        if len(dense) == len(blocks) == 1:
            row = dense[0].rows[:, None].contiguous()
            return Entry(name, number, parameter, matrix, one, row, ())
        right = one.new_empty(len(one), 0, matrix.shape[1])
        return Entry(name, number, parameter, matrix, one[:, :0], right, blocks)

    @cached_property
    def _ones(self) -> Tensor:
        losses = self._correction.losses
        return losses.new_ones(len(losses), 1, 1, dtype=torch.float32)

    # -- first pass ------------------------------------------------------------------------

    def propose(self, brake: float) -> None:
        """Move the moments and the weights, and show the guard the steps."""
        keeps = self._precision.rounding != "nearest"
        for group in self._optimizer.param_groups:
            for entries in self._prepared(group, keeps):
                self._propose(entries, _scalars(group, brake, entries[0].t))

    def _prepared(self, group: dict[str, Any], keeps: bool) -> Iterable[list[Entry]]:
        """Entries with a gradient that take the same step number, counted ones and others apart."""
        self._optimizer._init_group(group, [], [], [], [], [], [])
        lists: dict[Any, list[Entry]] = {}
        for p in group["params"]:
            entry = self._entries[id(p)]
            if keeps:
                entry.step = torch.zeros_like(entry.p)
            if p.grad is None:
                continue
            entry.state = state = self._optimizer.state[p]
            self._precision.settle(p, state)
            state["step"] = state["step"].cpu() + 1  # read on the host, where no one waits for it
            entry.t = int(state["step"])
            counts = self._correction.counts(entry.name)
            kind = (entry.t, p.dtype, state["exp_avg"].dtype, counts)
            lists.setdefault(kind, []).append(entry)
        return lists.values()

    def _propose(self, entries: list[Entry], adamw: settings.AdamW) -> None:
        before = {e.number: e.p.clone() for e in entries if e.rest and e.step is None}
        c, squared_norm = ops.adamw_propose_(
            [e.p for e in entries],
            [e.like(e.parameter.grad) for e in entries if e.parameter.grad is not None],
            [e.like(e.state["exp_avg"]) for e in entries],
            [e.like(e.state["exp_avg_sq"]) for e in entries],
            [e.left for e in entries],
            [e.right for e in entries],
            len(self._ones),
            adamw,
            [e.step for e in entries if e.step is not None],
        )
        if not self._correction.counts(entries[0].name):
            return
        self._correction.take(c, float(squared_norm))
        for e in entries:
            step = e.p - before[e.number] if e.number in before else e.step
            for block in e.rest:
                assert step is not None
                self._correction.take(block.coefficients(e.shaped(step)), 0.0)

    # -- second pass -----------------------------------------------------------------------

    def write(
        self,
        weights: Tensor,
        momentum: Mapping[str, Tensor],
        along: float,
        change: Coordinates | None,
    ) -> None:
        """Write p <- p - G^T a + along m, with the step where it still waits.

        Args:
            weights: a, (N,).
            momentum: first moments m by parameter name.
            along: factor of the momentum.
            change: takes what this has stored beyond the step, one parameter after another.
        """
        if change is None:
            for entries in self._kinds():
                self._write(entries, weights, momentum, along)
            return
        for e in self._entries.values():
            weight, step = e.p.clone(), None if e.step is None else e.step.clone()
            self._write([e], weights, momentum, along)
            stored = e.p - weight if step is None else e.p - weight - step
            change.add(e.name, e.shaped(stored))

    def _kinds(self) -> Iterable[list[Entry]]:
        """Entries that one launch can write: of one dtype and step number."""
        kinds: dict[Any, list[Entry]] = {}
        for e in self._entries.values():
            kinds.setdefault((e.p.dtype, e.t), []).append(e)
        return kinds.values()

    def _write(
        self, entries: list[Entry], weights: Tensor, momentum: Mapping[str, Tensor], along: float
    ) -> None:
        for e in entries:
            target = e.p if e.step is None else e.step
            for block in e.rest:
                block.subtract_(e.shaped(target), weights)
            if along and e.name in momentum:
                target.add_(momentum[e.name].view_as(target).to(target), alpha=along)
        ops.low_rank_apply_(
            [e.p for e in entries],
            [e.left for e in entries],
            [e.right for e in entries],
            weights,
            [e.step for e in entries if e.step is not None],
            rounding=self._precision.rounding,
            compensation=[self._owed(e) for e in entries] if self._is_kahan else (),
            seed=settings.Seed(self._precision.seed, entries[0].t),
            numbers=[e.number for e in entries],
        )

    @property
    def _is_kahan(self) -> bool:
        return self._precision.rounding == "kahan"

    def _owed(self, e: Entry) -> Tensor:
        state = self._optimizer.state[e.parameter]
        return e.like(state.setdefault("compensation", torch.zeros_like(e.parameter)))


def _scalars(group: Mapping[str, Any], brake: float, t: int) -> settings.AdamW:
    lr, (beta1, beta2) = float(group["lr"]) * min(brake, 1.0), map(float, group["betas"])
    return settings.AdamW(lr, beta1, beta2, group["eps"], group["weight_decay"], t)


def _joined(factors: list[Tensor]) -> Tensor:
    """Factors of several uses of one matrix, side by side."""
    return factors[0].contiguous() if len(factors) == 1 else torch.cat(factors, 1)
