"""What rank-q compression of the sketch costs in accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.overhead.workload import Workload
from safeopt.geometry.coverage import find_coverage
from safeopt.geometry.gradient_sketch import GradientSketch
from safeopt.geometry.moves import Eigenbasis
from safeopt.losses import reply_nll

Step = dict[str, Tensor]
RANKS = (1, 2, 4, 8, 16, None)


@dataclass(frozen=True)
class CompressionError:
    """Errors of one compression rank, against the exact token factors.

    Attributes:
        compression_rank: q; None is the exact sketch held against itself.
        lost_energy: share of ||G||^2 that compression drops, over all anchors and matrices.
        gram_error: ||K_q - K|| / ||K||, Frobenius.
        tangent_error: ||r_q - r|| / ||r||, with r the part that the tangent removes from a step.
        velocity_left: ||U^T s_q|| / ||U^T s||: velocity into the exact safety subspace that is
            left in the guarded step, as a share of the unguarded step's.
        sketch_bytes: bytes held.
    """

    compression_rank: int | None
    lost_energy: float
    gram_error: float
    tangent_error: float
    velocity_left: float
    sketch_bytes: int


@dataclass(frozen=True)
class Truth:
    """The exact sketch and what it does to a step."""

    sketch: GradientSketch
    gram: Tensor
    basis: Eigenbasis
    coefficients: Tensor
    removed: Step

    @classmethod
    def of(cls, sketch: GradientSketch, step: Step, eigenvalue_floor: float) -> Truth:
        """Apply the tangent of an exact sketch to ``step``."""
        gram = sketch.gram()
        basis = Eigenbasis.of(gram, None, eigenvalue_floor)
        coefficients = sketch.coefficients(step)
        return cls(sketch, gram, basis, coefficients, removed_by(sketch, basis, coefficients, step))


def measure(workload: Workload, lr: float, eigenvalue_floor: float) -> list[CompressionError]:
    """Compare every rank with the exact sketch on a real AdamW step of the workload."""
    step = adamw_step(workload, lr)
    truth = Truth.of(take_sketch(workload, None), step, eigenvalue_floor)
    return [_error(workload, rank, step, truth, eigenvalue_floor) for rank in RANKS]


def adamw_step(workload: Workload, lr: float, warmup: int = 3) -> Step:
    """The displacement that AdamW proposes after a few steps; the weights end where they began."""
    start = {name: p.detach().clone() for name, p in workload.model.named_parameters()}
    optimizer = torch.optim.AdamW(workload.model.parameters(), lr=lr)
    for _ in range(warmup):
        workload.train_forward_backward()
        optimizer.step()
    before = {name: p.detach().clone() for name, p in workload.model.named_parameters()}
    workload.train_forward_backward()
    optimizer.step()
    workload.model.zero_grad(set_to_none=True)
    step = {}
    with torch.no_grad():
        for name, p in workload.model.named_parameters():
            step[name] = p - before[name]
            p.copy_(start[name])
    return step


def take_sketch(workload: Workload, compression_rank: int | None) -> GradientSketch:
    """Measure the sketch of all anchors at the present weights."""
    return GradientSketch.measure(
        workload.model,
        find_coverage(workload.model),
        workload.anchors.batch().to(workload.batch.device),
        reply_nll,
        compression_rank=compression_rank,
    )


def removed_by(sketch: GradientSketch, basis: Eigenbasis, coefficients: Tensor, step: Step) -> Step:
    """Return r = G^T V Omega^-1 V^T c with c = G s, what the tangent removes from ``step``."""
    removed = {name: torch.zeros_like(delta) for name, delta in step.items()}
    sketch.subtract_(removed, -basis.tangent_weights(coefficients))
    return removed


def _error(
    workload: Workload, rank: int | None, step: Step, truth: Truth, eigenvalue_floor: float
) -> CompressionError:
    sketch = take_sketch(workload, rank)
    gram = sketch.gram()
    basis = Eigenbasis.of(gram, None, eigenvalue_floor)
    removed = removed_by(sketch, basis, sketch.coefficients(step), step)
    left = truth.coefficients - truth.sketch.coefficients(removed)
    return CompressionError(
        compression_rank=rank,
        lost_energy=1 - float(gram.trace() / truth.gram.trace()),
        gram_error=float((gram - truth.gram).norm() / truth.gram.norm()),
        tangent_error=_norm_of_difference(removed, truth.removed) / _norm(truth.removed),
        velocity_left=truth.basis.component_norm(left)
        / truth.basis.component_norm(truth.coefficients),
        sketch_bytes=sketch.nbytes,
    )


def _norm(step: Mapping[str, Tensor]) -> float:
    return float(torch.stack([delta.norm() for delta in step.values()]).norm())


def _norm_of_difference(first: Step, second: Step) -> float:
    return _norm({name: first[name] - second[name] for name in first})
