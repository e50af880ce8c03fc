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
from safeopt.diagnostics import Forecast, PlannedRun, forecast, run_pilot
from safeopt.geometry.coverage import device_of
from safeopt.training import data, models, optimizers
from safeopt.training.config import TrainConfig
from safeopt.training.loss import nll_sum


@dataclass(frozen=True)
class Diagnosis:
    """A forecast and what it is of.

    Attributes:
        forecast: the anchors along the planned run.
        planned: the run's rate and effective steps.
        steps: optimizer steps of the run.
        pilots: pilots made.
        pilot_steps: steps of each.
        anchors: anchors read.
    """

    forecast: Forecast
    planned: PlannedRun
    steps: int
    pilots: int
    pilot_steps: int
    anchors: int

    def facts(self) -> dict[str, float]:
        """Sizes, for a report."""
        return {
            "steps": self.steps,
            "effective_steps_planned": self.planned.effective_steps,
            "pilots": self.pilots,
            "pilot_steps": self.pilot_steps,
            "anchors": self.anchors,
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
    pilots: int = 2,
    pilot_steps: int = 32,
    opening: int = 4,
    tolerance: float = 0.1,
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
        pilots: pilots, each on batches of its own.
        pilot_steps: steps of each.
        opening: reply tokens that tell a refusal.
        tolerance: share of the anchors that may be lost.

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
    made = [
        run_pilot(
            bare,
            refusals,
            batches,
            planned,
            steps=pilot_steps,
            opening=opening,
            optimizer=lambda _, lr: optimizers.build_optimizer(
                bare, replace(config, learning_rate=lr)
            ),
            loss=lambda m, batch: _mean_nll(m, dict(batch)),
            max_norm=config.max_grad_norm or None,
        )
        for _ in range(pilots)
    ]
    return Diagnosis(
        forecast(made, tolerance=tolerance), planned, steps, pilots, pilot_steps, len(refusals)
    )


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


def _mean_nll(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    labels = batch.pop("labels")
    targets = (labels[:, 1:] != IGNORED).sum()
    return nll_sum(model(**batch, use_cache=False).logits, labels) / targets
