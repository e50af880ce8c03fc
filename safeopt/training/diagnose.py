"""Forecast a training run from its options, without making it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from safeopt import Anchors
from safeopt.anchors import IGNORED
from safeopt.diagnostics import (
    Condition,
    Forecast,
    Pilot,
    PlannedRun,
    as_dict,
    forecast,
    measure_condition,
    run_pilot,
)
from safeopt.diagnostics.pilot import Batch
from safeopt.geometry.coverage import device_of
from safeopt.training import data, models, optimizers
from safeopt.training.config import TrainConfig
from safeopt.training.loss import nll_sum

POWERS = (0.3, 0.5, 0.7)
"""Powers of the pilots: how far a run travels is known about so well."""

_SKETCHED = 16  # anchors in the condition's sketch, whose size grows with them


@dataclass(frozen=True)
class Diagnosis:
    """A forecast and what it is of.

    Attributes:
        forecast: the anchors along the planned run.
        condition: the Alignment Instability Condition; None if it was not asked for.
        planned: the run's rate and effective steps.
        steps: optimizer steps of the run.
        pilots: the pilots made.
        pilot_steps: steps of each.
        anchors: anchors read.
        rows: texts of the rows that the condition scores.
    """

    forecast: Forecast
    condition: Condition | None
    planned: PlannedRun
    steps: int
    pilots: tuple[Pilot, ...]
    pilot_steps: int
    anchors: int
    rows: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """What report.json holds, the run's options and the machine apart."""
        return as_dict(self.forecast, self.planned, self.pilots, self.condition) | {
            "steps": self.steps,
            "learning_rate": self.planned.learning_rate,
            "effective_steps_planned": self.planned.effective_steps,
            "pilots": len(self.pilots),
            "pilot_steps": self.pilot_steps,
            "anchors": self.anchors,
            "rows": list(self.rows),
        }


def learning_rates(config: TrainConfig, steps: int) -> list[float]:
    """The learning rate of every step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=steps,
    )
    rates = []
    for _ in range(steps):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return rates


def diagnose(
    config: TrainConfig,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    rows: Sequence[data.Row] | None = None,
    *,
    anchors: Anchors | str | Path | None = None,
    powers: Sequence[float] = POWERS,
    pilot_steps: int = 32,
    opening: int = 4,
    tolerance: float = 0.1,
    condition: bool = True,
    scored_rows: int = 8,
) -> Diagnosis:
    """Forecast what fine-tuning as ``config`` says does to the anchors.

    The forecast is of ``config.optimizer`` in one process and without its guard: that is the run
    whose danger is asked about. The model is left as it was, but for LoRA when ``config`` asks for
    it.

    Args:
        config: options of the run, as for `safeopt.training.train`.
        model: a model in memory; otherwise ``config.model_name_or_path``.
        tokenizer: its tokenizer; otherwise loaded beside the model.
        rows: training rows in memory; otherwise ``config.dataset``.
        anchors: a JSONL file, or anchors in memory; otherwise ``config.anchors``. Only ``refuse``
            anchors are read.
        powers: one pilot each, see `PlannedRun.compression`; their spread is the forecast's.
        pilot_steps: steps of each.
        opening: reply tokens that tell a refusal.
        tolerance: share of the anchors that may be lost.
        condition: measure the Alignment Instability Condition too, on up to 16 anchors.
        scored_rows: rows whose own push is measured with it.

    Raises:
        ValueError: bad options, rows or anchors.
        FloatingPointError: an anchor loss is not finite.
    """
    tokenizer = models.load_tokenizer(config) if tokenizer is None else tokenizer
    found = data.required_rows(config.dataset, rows)
    examples = data.tokenize(found, tokenizer, config.max_length, config.completion_only_loss)
    refusals = _anchors(config, tokenizer, anchors).of_kind("refuse")
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    plan = data.BatchPlan(len(examples), rows_per_step, config.seed)
    steps = config.planned_steps(plan.rows, rows_per_step)
    planned = PlannedRun.from_rates(learning_rates(config, steps))
    bare = models.load_model(config) if model is None else model
    bare = models.prepare_for_training(bare, config)
    batches = _batches(examples, plan, tokenizer, device_of(bare))

    def optimizer(_: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return optimizers.build_optimizer(bare, replace(config, learning_rate=lr))

    pilots = tuple(
        run_pilot(
            bare, refusals, batches, planned, steps=pilot_steps, readings=8, opening=opening,
            power=power, optimizer=optimizer, loss=_mean_nll, max_norm=config.max_grad_norm or None,
        )
        for power in powers
    )  # fmt: skip
    measured = None
    if condition:
        measured = measure_condition(
            bare, refusals.first(_SKETCHED), _as_anchors(examples[: len(refusals)][:_SKETCHED]),
            batches, planned.learning_rate, optimizer=optimizer, loss=_mean_nll,
            rows=[_one_row(e, device_of(bare)) for e in examples[:scored_rows]],
        )  # fmt: skip
    return Diagnosis(
        forecast=forecast(pilots, tolerance=tolerance),
        condition=measured,
        planned=planned,
        steps=steps,
        pilots=pilots,
        pilot_steps=pilot_steps,
        anchors=len(refusals),
        rows=tuple(_text(row) for row in found[:scored_rows]) if condition else (),
    )


def _as_anchors(examples: Sequence[data.Example]) -> Anchors:
    return Anchors.from_tokens([e.input_ids for e in examples], [e.labels for e in examples])


def _one_row(example: data.Example, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in data.collate([example], 0).items()}


def _text(row: data.Row, length: int = 160) -> str:
    text = " | ".join(str(value) for key, value in row.items() if key != "_where")
    return text if len(text) <= length else text[: length - 1] + "…"


def _anchors(config: TrainConfig, tokenizer: Any, anchors: Anchors | str | Path | None) -> Anchors:
    if isinstance(anchors, Anchors):
        return anchors
    path = config.anchors if anchors is None else anchors
    if path is None:
        raise ValueError("a forecast needs anchors: set `anchors` to a JSONL file, or pass them")
    return Anchors.from_jsonl(path, tokenizer)


def _batches(
    examples: Sequence[data.Example], plan: data.BatchPlan, tokenizer: Any, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The batches of the planned run, in its order."""
    pad = tokenizer.pad_token_id
    for step in itertools.count():
        batch = data.collate([examples[i] for i in plan.indices(step)], 0 if pad is None else pad)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _mean_nll(model: nn.Module, batch: Batch) -> Tensor:
    inputs = dict(batch)
    labels = inputs.pop("labels")
    targets = (labels[:, 1:] != IGNORED).sum()
    return nll_sum(model(**inputs, use_cache=False).logits, labels) / targets
