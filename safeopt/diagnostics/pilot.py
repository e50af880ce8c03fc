"""Pilots: a few steps, longer ones than the planned run's, that travel as far as it does."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.anchors import IGNORED, Anchors
from safeopt.curvature.vectors import norm, restored, trainable_parameters
from safeopt.geometry.capture import check_finite, logits_of
from safeopt.geometry.coverage import device_of, unwrapped
from safeopt.isolation import own_gradients, undisturbed
from safeopt.losses import reply_nll

Batch = Mapping[str, Tensor]
MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
TaskLoss = Callable[[nn.Module, Batch], Tensor]
Judge = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class PlannedRun:
    """The run to be forecast, as far as its length matters.

    Attributes:
        learning_rate: eta, its peak.
        effective_steps: S, the sum of the schedule's rates over the peak; S eta is the
            accumulated learning rate.
    """

    learning_rate: float
    effective_steps: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and greater than 0, got {value}")

    @classmethod
    def from_rates(cls, rates: Sequence[float]) -> PlannedRun:
        """A run with these learning rates, one a step.

        Raises:
            ValueError: no rate, or none above 0.
        """
        if not rates or max(rates) <= 0:
            raise ValueError("the planned run has no step with a learning rate above 0")
        return cls(max(rates), sum(rates) / max(rates))

    def compression(self, steps: int, power: float = 0.5) -> float:
        """Factor on the rate with which ``steps`` steps travel as far: max(1, (S / steps)^power).

        Adam's steps are as long as the rate says, whatever the gradients. Where those of fresh
        batches decorrelate, the way grows with the root of the number of steps; steps that
        all point one way make the power 1, steps that undo each other less than a half.
        """
        return float(max(1.0, (self.effective_steps / steps) ** power))

    def pilot_steps(self, steps: int) -> int:
        """Steps of a pilot that would have ``steps``: no more than the run."""
        return min(steps, math.ceil(self.effective_steps))


@dataclass(frozen=True)
class Reading:
    """The anchors at one moment.

    Attributes:
        losses: mean reply NLL, nats per token, (N,).
        kept: whether greedy decoding still opens as the anchor's reply does, or what a judge
            says of its replies, (N,).
        chances: probability that sampling opens so, (N,).
        margins: least lead of the opening's tokens over the best other token, in logits, (N,);
            negative where the opening is lost.
    """

    losses: Tensor
    kept: Tensor
    chances: Tensor
    margins: Tensor


@torch.no_grad()
def read_anchors(
    model: nn.Module,
    anchors: Anchors,
    *,
    opening: int = 4,
    at_once: int = 16,
    judge: Judge | None = None,
) -> Reading:
    """Read losses and kept openings by forward passes alone.

    An opening is kept if each of the reply's first ``opening`` tokens is the most likely one
    after the tokens before it: then, and only then, greedy decoding begins with them.

    Args:
        model: the model; left as it was.
        anchors: the anchors.
        opening: tokens compared; shorter replies are compared whole.
        at_once: anchors in one forward pass.
        judge: tells which anchors the model still answers as it should, (N,), in place of their
            openings.

    Raises:
        FloatingPointError: an anchor loss is not finite.
    """
    parts = []
    indices = list(range(len(anchors)))
    for start in indices[::at_once]:
        batch = anchors.batch(indices[start : start + at_once]).to(device_of(model))
        with undisturbed(model):
            logits = logits_of(model, batch)
        parts.append((reply_nll(logits, batch.labels), *_opening(logits, batch.labels, opening)))
    losses, kept, chances, margins = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    check_finite(losses)
    return Reading(losses, kept if judge is None else judge(model), chances, margins)


def _opening(logits: Tensor, labels: Tensor, opening: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `Reading` holds of the openings of a batch: kept, chances and margins, (N,) each."""
    targets = labels[:, 1:]
    in_reply = targets != IGNORED
    rows, columns = torch.nonzero(in_reply & (in_reply.cumsum(1) <= opening), as_tuple=True)
    scores, wanted = logits[rows, columns].float(), targets[rows, columns][:, None]
    missed = (scores.argmax(-1, keepdim=True) != wanted).squeeze(1)
    own = scores.gather(1, wanted).squeeze(1)
    nll = scores.logsumexp(-1) - own
    lead = own - scores.scatter(1, wanted, -torch.inf).amax(-1)
    zeros = lead.new_zeros(len(labels))
    return (
        zeros.index_add(0, rows, missed.float()) == 0,
        torch.exp(-zeros.index_add(0, rows, nll)),
        zeros.scatter_reduce(0, rows, lead, "amin", include_self=False),
    )


@dataclass(frozen=True)
class Pilot:
    """What a compressed pilot saw.

    Attributes:
        planned: the run it stands for.
        compression: factor on the learning rate, see `PlannedRun.compression`.
        effective_steps: planned steps that each reading stands for, beginning with 0, (R,).
        losses: anchor losses at each reading, nats per token, (R, N).
        kept: kept openings at each reading, (R, N).
        chances: probabilities of the openings at each reading, (R, N).
        margins: leads of the openings at each reading, in logits, (R, N).
        distances: how far the weights have moved at each reading, (R,).
        task_losses: task loss of every pilot step, nats.
    """

    planned: PlannedRun
    compression: float
    effective_steps: Tensor
    losses: Tensor
    kept: Tensor
    chances: Tensor
    margins: Tensor
    distances: Tensor
    task_losses: Tensor


def adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay, the optimizer of most fine-tuning runs."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


def mean_nll(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a Hugging Face model returns for a batch with labels."""
    loss: Tensor = model(**batch).loss
    return loss


WINDOW = 8.0
"""Factor on the rate beyond which a pilot is no witness any more."""

POWERS = (0.0, 0.5, 1.0)
"""The run's own first steps, a way that grows with the root of the steps, and a straight one."""

_APART = 1.05  # pilots whose rates are nearer than that are one


def run_pilots(
    model: nn.Module,
    anchors: Anchors,
    batches: Callable[[], Iterator[Batch]],
    planned: PlannedRun,
    *,
    steps: int = 32,
    opening: int = 4,
    powers: Sequence[float] = POWERS,
    judge: Judge | None = None,
    **options: Any,
) -> tuple[Pilot, ...]:
    """Pilots between the run's own first steps and those of a straight way.

    They see the same batches, so that they differ in their rates alone. A run that is hardly
    longer than a pilot has one pilot; none steps more than `WINDOW` times as far as the run.

    Args:
        model: the aligned model, with what will train unfrozen.
        anchors: the anchors.
        batches: gives the run's batches from the first on.
        planned: the run to stand for.
        steps: steps of each pilot.
        opening: see `read_anchors`.
        powers: see `PlannedRun.compression`.
        judge: see `read_anchors`.
        options: further keywords of `run_pilot`.
    """
    start = read_anchors(unwrapped(model), anchors, opening=opening, judge=judge)
    made: list[Pilot] = []
    for power in sorted(powers):
        factor = planned.compression(planned.pilot_steps(steps), power)
        fastest = made[-1].compression if made else 0.0
        if factor > _APART * fastest and fastest < WINDOW:
            made.append(
                run_pilot(
                    model, anchors, batches(), planned,
                    steps=steps, opening=opening, power=power, start=start, judge=judge, **options,
                )
            )  # fmt: skip
    return tuple(made)


def run_pilot(
    model: nn.Module,
    anchors: Anchors,
    batches: Iterator[Batch],
    planned: PlannedRun,
    *,
    steps: int = 32,
    readings: int = 4,
    opening: int = 4,
    power: float = 0.5,
    optimizer: MakeOptimizer = adamw,
    loss: TaskLoss = mean_nll,
    max_norm: float | None = None,
    start: Reading | None = None,
    judge: Judge | None = None,
) -> Pilot:
    """Train a few steps that travel as far as the planned run, and read the anchors on the way.

    ``steps`` steps at the rate eta (S / steps)^power stand for S steps at eta, or for fewer where
    that is more than `WINDOW` times the rate. A run that is shorter than the pilot is run as it
    is. Weights, gradients, buffers, modes and RNG state are put back bit for bit, also on errors;
    the cost beside the steps is a copy of what trains.

    Args:
        model: the aligned model, with what will train unfrozen.
        anchors: the anchors.
        batches: task batches on the model's device, at least ``steps`` of them.
        planned: the run to stand for.
        steps: pilot steps, K.
        readings: how often the anchors are read after the start.
        opening: see `read_anchors`.
        power: see `PlannedRun.compression`.
        optimizer: makes the planned optimizer from parameters and a learning rate.
        loss: the task loss of a batch.
        max_norm: gradients are clipped to this norm.
        start: the anchors at the present weights, where they have been read.
        judge: see `read_anchors`.

    Raises:
        ValueError: nothing trains, or too few batches.
        FloatingPointError: an anchor loss is not finite.
    """
    bare = unwrapped(model)
    trained = [p for p in bare.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: unfreeze what will train")
    count = planned.pilot_steps(steps)
    compression = min(WINDOW, planned.compression(count, power))
    due = {round(count * (r + 1) / readings) for r in range(readings)}
    read = functools.partial(read_anchors, bare, anchors, opening=opening, judge=judge)
    seen = [read() if start is None else start]
    at, distances, task_losses = [0], [0.0], []
    parameters = trainable_parameters(bare)
    with restored(parameters) as origin, training(bare):
        stepper = optimizer(trained, planned.learning_rate * compression)
        for step in range(1, count + 1):
            batch = _next(batches, step, count)
            task_losses.append(_train_step(bare, stepper, batch, loss, max_norm))
            if step in due:
                seen.append(read())
                at.append(step)
                distances.append(norm(p.detach() - origin[n] for n, p in parameters.items()))
    scale = planned.effective_steps / count
    return Pilot(
        planned=planned,
        compression=compression,
        effective_steps=torch.tensor(at, dtype=torch.float64) * scale,
        losses=torch.stack([reading.losses for reading in seen]),
        kept=torch.stack([reading.kept for reading in seen]),
        chances=torch.stack([reading.chances for reading in seen]),
        margins=torch.stack([reading.margins for reading in seen]),
        distances=torch.tensor(distances, dtype=torch.float64),
        task_losses=torch.tensor(task_losses),
    )


def _next(batches: Iterator[Batch], step: int, count: int) -> Batch:
    batch = next(batches, None)
    if batch is None:
        raise ValueError(f"the batches ended after {step - 1}; the pilot needs {count}")
    return batch


def _train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    loss: TaskLoss,
    max_norm: float | None,
) -> float:
    value = loss(model, batch)
    value.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(value.detach())


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Train mode and empty gradients in the body; modes, gradients and RNG state come back."""
    with own_gradients(model), undisturbed(model, reentrant=True):
        model.train()
        yield
