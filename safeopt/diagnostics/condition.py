"""The Alignment Instability Condition of a planned run, measured (Springer et al. 2026, def. 5.1).

Three things together make alignment collapse: few sharp directions that it depends on (the spectrum
of the anchors' Fisher), a first step that avoids them (overlap), and curvature that bends the path
into them (coupling). Each is measured against what chance or harmless text gives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safeopt.anchors import AnchorBatch, Anchors
from safeopt.curvature import FiniteDifference, Hessian
from safeopt.curvature.vectors import norm, restored, trainable_parameters
from safeopt.diagnostics.lookahead import Estimate, Law, look_ahead, mean_law
from safeopt.diagnostics.pilot import Batch, MakeOptimizer, TaskLoss, adamw, mean_nll, training
from safeopt.geometry.capture import logits_of
from safeopt.geometry.coverage import device_of, find_coverage, unwrapped
from safeopt.geometry.gradient_sketch import GradientSketch
from safeopt.geometry.moves import Eigenbasis
from safeopt.isolation import undisturbed
from safeopt.losses import reply_nll

_FLOOR = 1e-4
# Batches differ by more than this error, and language models meet it at this step of the weights.
_HESSIAN_ERROR, _HESSIAN_STEP = 0.1, 1e-5


@dataclass(frozen=True)
class Module:
    """One parameter's part in the condition.

    Attributes:
        layer: number of its layer, -1 outside the layers.
        kind: its name without the layer.
        mass: its share of tr(F).
        overlap: ||G_p s_p|| over ||G s||, its share of the first step's velocity; shares do not sum
            to 1, since parts may cancel.
    """

    layer: int
    kind: str
    mass: float
    overlap: float


@dataclass(frozen=True)
class Condition:
    """The measured condition.

    Attributes:
        spectrum: eigenvalues of the anchors' Fisher G^T G / N, largest first, (N,).
        null_spectrum: the same of as many harmless rows.
        rank: directions kept, k.
        tail: share of the spectrum's mass beyond the first tenth of its eigenvalues.
        null_tail: the same of the null spectrum.
        overlap: ||U^T s|| / ||s|| of the optimizer's first step s.
        expected_overlap: of a random direction, sqrt(k / P).
        velocity: first-order change of the mean anchor loss in one planned step, nats.
        coupling: second-order change through the task's curvature, the mean of
            -(||s|| / ||g||) G_i (H s), nats per planned step squared; exact for SGD.
        acceleration: all of the second order along the optimizer's own path, by look-ahead.
        law: what the look-ahead says of the way ahead, the mean over batches.
        hessian_error: predicted relative error of the Hessian's finite difference.
        modules: the condition by parameter.
        row_scores: rise of the mean anchor loss that two planned steps on each row alone give.
    """

    spectrum: Tensor
    null_spectrum: Tensor
    rank: int
    overlap: Estimate
    expected_overlap: float
    velocity: Estimate
    coupling: Estimate
    acceleration: Estimate
    law: Law
    hessian_error: float
    modules: tuple[Module, ...]
    row_scores: tuple[float, ...]

    @property
    def tail(self) -> float:
        """Share of the mass beyond the first tenth of the eigenvalues."""
        return tail(self.spectrum)

    @property
    def null_tail(self) -> float:
        """The same of harmless rows."""
        return tail(self.null_spectrum)


def tail(spectrum: Tensor) -> float:
    """Share of a spectrum's mass beyond the first tenth of its eigenvalues (one at least)."""
    first = max(1, len(spectrum) // 10)
    return float(spectrum[first:].sum() / spectrum.sum())


def measure_condition(
    model: nn.Module,
    anchors: Anchors,
    harmless: Anchors,
    batches: Iterator[Batch],
    rate: float,
    *,
    probes: int = 3,
    stride: float = 8.0,
    rows: Sequence[Batch] = (),
    optimizer: MakeOptimizer = adamw,
    loss: TaskLoss = mean_nll,
    compression_rank: int | None = 8,
) -> Condition:
    """Measure the condition of a run; the model is left as it was.

    The cost is two sketches (a forward-backward of N anchors each) and, for each probe, one
    Hessian product, three task gradients and four forward passes of the anchors.

    Args:
        model: the aligned model, with what will train unfrozen, in fp32.
        anchors: the anchors, N of them.
        harmless: as much harmless text, for the null spectrum.
        batches: task batches on the model's device, ``probes`` of them.
        rate: the planned learning rate.
        probes: batches looked at; intervals are over them.
        stride: planned steps that one step of the look-ahead stands for.
        rows: batches of one row each, to be scored.
        optimizer: makes the planned optimizer from parameters and a learning rate.
        loss: the task loss of a batch.
        compression_rank: see `GradientSketch.measure`.

    Raises:
        ValueError: nothing trains, or half-precision weights.
    """
    bare = unwrapped(model)
    device = device_of(bare)
    subject = anchors.batch().to(device)
    with undisturbed(bare):
        sketch = sketch_of(bare, subject, compression_rank)
        null = sketch_of(bare, harmless.batch().to(device), compression_rank)
    parameters = trainable_parameters(bare)
    drawn = [next(batches) for _ in range(probes)]
    losses = _losses(bare, subject)
    product = FiniteDifference(  # settles its step on the first probe
        bare, check="first", tolerance=_HESSIAN_ERROR, step=_HESSIAN_STEP
    )
    before, seen, laws = losses(), [], []
    for batch in drawn:
        with training(bare):
            gradient = _gradient(bare, batch, loss)
        seen.append(_probe(bare, sketch, batch, gradient, rate, optimizer, loss, product))
        with training(bare):
            path = _path(bare, batch, stride * rate, optimizer, loss, gradient)
            laws += look_ahead(parameters, losses, [path], stride=stride, before=before)
    with training(bare):
        scores = _row_scores(bare, rows, losses, before, stride * rate, optimizer, loss)
    eigenbasis = Eigenbasis.of(sketch.gram(), None, _FLOOR)
    size = sum(p.numel() for p in parameters.values())
    return Condition(
        spectrum=sketch.spectrum(),
        null_spectrum=null.spectrum(),
        rank=len(eigenbasis.values),
        overlap=Estimate.of([eigenbasis.component_norm(p.slopes) / p.length for p in seen]),
        expected_overlap=math.sqrt(len(eigenbasis.values) / size),
        velocity=Estimate.of([float(p.slopes.mean()) for p in seen]),
        coupling=Estimate.of([float(p.coupling.mean()) for p in seen]),
        acceleration=Estimate.of([float(law.acceleration.mean()) for law in laws]),
        law=mean_law(laws),
        hessian_error=product.error,
        modules=_modules(sketch, seen[0].step),
        row_scores=scores,
    )


@dataclass(frozen=True)
class _Probe:
    step: Mapping[str, Tensor]
    length: float
    slopes: Tensor
    coupling: Tensor


def sketch_of(model: nn.Module, batch: AnchorBatch, rank: int | None = 8) -> GradientSketch:
    """The sketch of the anchors' reply NLL."""
    return GradientSketch.measure(
        model, find_coverage(model), batch, reply_nll, compression_rank=rank
    )


def _losses(model: nn.Module, batch: AnchorBatch) -> Callable[[], Tensor]:
    def losses() -> Tensor:
        with torch.no_grad(), undisturbed(model):
            return reply_nll(logits_of(model, batch), batch.labels)

    return losses


def _gradient(model: nn.Module, batch: Batch, loss: TaskLoss) -> dict[str, Tensor | None]:
    """The task's gradient on a batch, taken out of ``p.grad``."""
    loss(model, batch).backward()
    parameters = trainable_parameters(model)
    found = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return found


def _path(
    model: nn.Module,
    batch: Batch,
    rate: float,
    make: MakeOptimizer,
    loss: TaskLoss,
    first: Mapping[str, Tensor | None] | None = None,
) -> Callable[[], None]:
    """Makes one step after the other on a batch, whose ``first`` gradient may be known."""
    stepper = make([p for p in model.parameters() if p.requires_grad], rate)
    known = [] if first is None else [first]

    def step() -> None:
        gradient = known.pop() if known else _gradient(model, batch, loss)
        for name, p in trainable_parameters(model).items():
            p.grad = gradient[name]
        stepper.step()
        stepper.zero_grad()

    return step


def _probe(
    model: nn.Module,
    sketch: GradientSketch,
    batch: Batch,
    gradient: Mapping[str, Tensor | None],
    rate: float,
    make: MakeOptimizer,
    loss: TaskLoss,
    product: FiniteDifference,
) -> _Probe:
    """The first step on a batch, what it does to first order, and the Hessian's part."""
    parameters = trainable_parameters(model)
    with training(model), restored(parameters) as origin:
        _path(model, batch, rate, make, loss, gradient)()
        step = {name: p.detach() - origin[name] for name, p in parameters.items()}
    length = norm(g for g in gradient.values() if g is not None)
    return _Probe(
        step=step,
        length=norm(step.values()),
        slopes=sketch.coefficients(step),
        coupling=coupling_along(model, sketch, step, length, lambda m: loss(m, batch), product),
    )


def coupling_along(
    model: nn.Module,
    sketch: GradientSketch,
    step: Mapping[str, Tensor],
    gradient: float,
    loss: Callable[[nn.Module], Tensor],
    product: FiniteDifference,
) -> Tensor:
    """-(||s|| / ||g||) G_i (H s), nats per step squared, (N,).

    Args:
        model: the model.
        sketch: G, at its weights.
        step: s, one step's displacement.
        gradient: ||g||, the norm of the task's gradient.
        loss: the task loss, whose Hessian is H.
        product: how H is multiplied.
    """
    bend = Hessian(model, loss, method=product).matvec(step)
    return -(norm(step.values()) / max(gradient, 1e-30)) * sketch.coefficients(bend)


def overlap_of(sketch: GradientSketch, step: Mapping[str, Tensor]) -> float:
    """||U^T s|| / ||s||, U spanning the sketched gradients."""
    eigenbasis = Eigenbasis.of(sketch.gram(), None, _FLOOR)
    return eigenbasis.component_norm(sketch.coefficients(step)) / max(norm(step.values()), 1e-30)


def _row_scores(
    model: nn.Module,
    rows: Sequence[Batch],
    losses: Callable[[], Tensor],
    before: Tensor,
    rate: float,
    make: MakeOptimizer,
    loss: TaskLoss,
) -> tuple[float, ...]:
    parameters = trainable_parameters(model)
    scores = []
    for row in rows:
        step = _path(model, row, rate, make, loss)
        with restored(parameters):
            step()
            step()
            scores.append(float((losses() - before).mean()))
    return tuple(scores)


def _modules(sketch: GradientSketch, step: Mapping[str, Tensor]) -> tuple[Module, ...]:
    energy = {
        name: float(sum(block.gram().diagonal().sum() for block in blocks))
        for name, blocks in sketch.blocks.items()
    }
    whole = max(float(sketch.coefficients(step).norm()), 1e-30)
    total = max(sum(energy.values()), 1e-30)
    return tuple(
        Module(
            *_place(name),
            mass=energy[name] / total,
            overlap=float(sketch.coefficients({name: step[name]}).norm()) / whole,
        )
        for name in energy
    )


def _place(name: str) -> tuple[int, str]:
    """Layer number and the rest of a parameter's name."""
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        return -1, name.rsplit(".weight", 1)[0].split(".", 1)[-1]
    return int(found[1]), name[found.end() :].rsplit(".weight", 1)[0]
