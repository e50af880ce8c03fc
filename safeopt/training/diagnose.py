"""Forecast a training run from its options, without making it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    Verdict,
    as_dict,
    forecast,
    measure_condition,
    run_pilot,
    run_pilots,
)
from safeopt.diagnostics.cheap import cheap_predictors, gradients, rise_after
from safeopt.diagnostics.evaluated import Comparison, nearest
from safeopt.diagnostics.pilot import POWERS, Batch, Judge
from safeopt.diagnostics.suggestions import GuardedPilot
from safeopt.evaluation import Decoding, refusal_judge
from safeopt.geometry.coverage import device_of, find_coverage, unwrapped
from safeopt.training import data, models, optimizers
from safeopt.training.config import GUARDED, OptimizerName, TrainConfig
from safeopt.training.launch import lent_to_accelerate, make_accelerator
from safeopt.training.loss import nll_sum

PILOT_STEPS, READINGS = 10, 2
"""Of each pilot: those of the forecasts that were compared with outcomes on SmolLM2-135M."""

_OPENING, _REPLY = 4, 24  # tokens
_SAFE: dict[OptimizerName, OptimizerName] = {"adamw": "safe_adamw", "sgd": "safe_sgd"}
_SKETCHED = 16  # anchors in the condition's sketch, whose size grows with them


@dataclass(frozen=True)
class Diagnosis:
    """A forecast and what it is of.

    Attributes:
        forecast: the anchors along the planned run; its verdict heeds the comparison.
        comparison: cheap predictors of the run, and what each was worth where outcomes are known.
        condition: the Alignment Instability Condition; None if it was not asked for.
        planned: the run's rate and effective steps.
        steps: optimizer steps of the run.
        pilots: the pilots made.
        guarded: a pilot under a guard, where the run is no GO.
        pilot_steps: steps of each.
        anchors: anchors read.
        read_by: how they were.
        rows: texts of the rows that the condition scores.
        stages: seconds of each part.
    """

    forecast: Forecast
    comparison: Comparison
    condition: Condition | None
    planned: PlannedRun
    steps: int
    pilots: tuple[Pilot, ...]
    guarded: GuardedPilot | None
    pilot_steps: int
    anchors: int
    read_by: str
    rows: tuple[str, ...]
    stages: dict[str, float]

    def document(self) -> dict[str, Any]:
        """What report.json holds, the run's options and the machine apart."""
        parts = (self.forecast, self.planned, self.pilots, self.condition, self.guarded)
        return as_dict(*parts, self.comparison) | {
            "steps": self.steps,
            "learning_rate": self.planned.learning_rate,
            "effective_steps_planned": self.planned.effective_steps,
            "pilot_steps": self.pilot_steps,
            "anchors": self.anchors,
            "read_by": self.read_by,
            "rows": list(self.rows),
            "stages": {name: round(seconds, 1) for name, seconds in self.stages.items()},
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
    pilot_steps: int = PILOT_STEPS,
    opening: int | None = None,
    tolerance: float = 0.1,
    condition: bool = True,
    scored_rows: int = 4,
) -> Diagnosis:
    """Forecast what fine-tuning as ``config`` says does to the anchors.

    The forecast is of ``config.optimizer`` in one process, in its mixed precision and without its
    guard: that is the run whose danger is asked about. If it is no GO, one more pilot trains under
    a guard, which is given every second anchor, and is judged on the others. The condition is
    measured in the weights' own precision, since it rests on small differences. The model is left
    as it was, but for LoRA when ``config`` asks for it.

    Args:
        config: options of the run, as for `safeopt.training.train`.
        model: a model in memory; otherwise ``config.model_name_or_path``.
        tokenizer: its tokenizer; otherwise loaded beside the model.
        rows: training rows in memory; otherwise ``config.dataset``.
        anchors: a JSONL file, or anchors in memory; otherwise ``config.anchors``. Only ``refuse``
            anchors are read.
        powers: one pilot each, see `run_pilots`.
        pilot_steps: steps of each.
        opening: reply tokens that tell a refusal. By default the model's greedy replies are judged
            (`safeopt.evaluation.is_refusal`, in English), which takes longer; models that have no
            ``generate`` are read by openings of 4 tokens.
        tolerance: share of the anchors that may be lost.
        condition: measure the Alignment Instability Condition too, on up to 16 anchors.
        scored_rows: rows whose own push is measured with it.

    Raises:
        ValueError: bad options, rows or anchors.
        FloatingPointError: an anchor loss is not finite.
    """
    if pilot_steps < 1:
        raise ValueError(f"pilot_steps must be at least 1, got {pilot_steps}")
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
    setup = _Setup(bare, config, planned, examples, plan, tokenizer, pilot_steps, opening)
    clock, scored = _Clock(), _spread(len(examples), scored_rows) if condition else []
    with models.checkpointing_undone(bare, config):
        pilots, comparison, made, guarded = _piloted(setup, refusals, powers, tolerance, clock)
        measured = setup.condition(refusals.first(_SKETCHED), scored) if condition else None
    clock.lap("condition")
    return Diagnosis(
        forecast=made,
        comparison=comparison,
        condition=measured,
        planned=planned,
        steps=steps,
        pilots=pilots,
        guarded=guarded,
        pilot_steps=pilot_steps,
        anchors=len(refusals),
        read_by=setup.read_by,
        rows=tuple(_text(found[i]) for i in scored),
        stages=clock.laps,
    )


class _Clock:
    def __init__(self) -> None:
        self._last, self.laps = time.perf_counter(), dict[str, float]()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._last, self.laps[name] = now, now - self._last


@dataclass(frozen=True)
class _Setup:
    """What pilots are made of."""

    model: nn.Module
    config: TrainConfig
    planned: PlannedRun
    examples: Sequence[data.Example]
    plan: data.BatchPlan
    tokenizer: Any
    pilot_steps: int
    opening: int | None

    @property
    def read_by(self) -> str:
        """How anchors are read."""
        if self.opening is None and hasattr(self.model, "generate"):
            return f"greedy replies of {_REPLY} tokens, judged"
        return f"openings of {self.opening or _OPENING} tokens"

    def options(self, anchors: Anchors) -> dict[str, Any]:
        """What pilots that read these anchors share."""
        return {
            "opening": self.opening or _OPENING,
            "judge": self._judge(anchors) if "judged" in self.read_by else None,
            "optimizer": self.optimizer,
            "loss": _mean_nll,
            "max_norm": self.config.max_grad_norm or None,
        }

    def _judge(self, anchors: Anchors) -> Judge:
        """Judges replies that are decoded without accelerate's wrapper, from a cast copy."""
        dtype = "bfloat16" if self.config.mixed_precision == "bf16" else None
        refused = refusal_judge(anchors, self.tokenizer, Decoding(_REPLY, dtype=dtype))

        def judge(model: nn.Module) -> Tensor:
            with lent_to_accelerate(model):
                model.__dict__.pop("forward", None)
                return refused(model)

        return judge

    def comparison(self, anchors: Anchors, pilot: Pilot, verdict: Verdict) -> Comparison:
        """The run's cheap predictors, beside what they were worth on the nearest model."""
        norm, cosine = gradients(self.model, next(self.batches()), anchors, loss=_mean_nll)
        cheap = cheap_predictors(self.planned, norm, cosine, rise_after(pilot))
        size = sum(p.numel() for p in self.model.parameters())
        return Comparison(cheap, nearest(size), self.planned.effective_steps, verdict)

    def condition(self, anchors: Anchors, scored: Sequence[int]) -> Condition:
        """The condition on these anchors, and the push of the ``scored`` rows."""
        return measure_condition(
            self.model, anchors, _as_anchors(_like(self.examples, anchors)),
            self.batches(), self.planned.learning_rate, optimizer=self.optimizer, loss=_mean_nll,
            rows=[_one_row(self.examples[i], device_of(self.model)) for i in scored],
        )  # fmt: skip

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The batches of the planned run, in its order."""
        pad = self.tokenizer.pad_token_id
        for step in itertools.count():
            rows = [self.examples[i] for i in self.plan.indices(step)]
            batch = data.collate(rows, 0 if pad is None else pad)
            yield {name: tensor.to(device_of(self.model)) for name, tensor in batch.items()}

    def optimizer(self, _: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """The planned optimizer, without a guard."""
        return optimizers.build_optimizer(self.model, replace(self.config, learning_rate=lr))

    def guarded_pilot(self, anchors: Anchors, power: float) -> GuardedPilot:
        """A pilot as far as the run goes, guarded by every second anchor, read on the others."""
        name = _SAFE.get(self.config.optimizer, self.config.optimizer)
        config = replace(self.config, optimizer=name, monitor="off")
        given, held_out = anchors.every(2, 0), anchors.every(2, 1)

        def optimizer(_: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
            made: Any = optimizers.build_optimizer(self.model, replace(config, learning_rate=lr))
            made.hold(optimizers.build_guard(self.model, given, config))
            return made  # type: ignore[no-any-return]

        pilot = run_pilot(
            self.model, held_out, self.batches(), self.planned, steps=self.pilot_steps, readings=1,
            power=power, **(self.options(held_out) | {"optimizer": optimizer}),
        )  # fmt: skip
        kind = optimizers.KINDS[name].__name__
        return GuardedPilot(pilot, kind, float(optimizers.guard_options(config)["budget"]))


def _piloted(
    setup: _Setup, anchors: Anchors, powers: Sequence[float], tolerance: float, clock: _Clock
) -> tuple[tuple[Pilot, ...], Comparison, Forecast, GuardedPilot | None]:
    """The pilots, the cheap predictors, the forecast of both, and under a guard if it is no GO."""
    model, config = setup.model, setup.config
    with _in_precision_of(model, config), _plain_attention(model, config):
        pilots = run_pilots(
            model, anchors, setup.batches, setup.planned, steps=setup.pilot_steps,
            readings=READINGS, powers=powers, **setup.options(anchors),
        )  # fmt: skip
        clock.lap("pilots")
        own = forecast(pilots, tolerance=tolerance)
        comparison = setup.comparison(anchors, pilots[0], own.verdict)
        made, guarded = comparison.weighed(own), None
        clock.lap("cheap predictors")
        if made.verdict is not Verdict.GO and _can_be_guarded(model, config, anchors):
            guarded = setup.guarded_pilot(anchors, made.power.value)
        clock.lap("guarded pilot")
    return pilots, comparison, made, guarded


def _can_be_guarded(model: nn.Module, config: TrainConfig, anchors: Anchors) -> bool:
    known = _SAFE.get(config.optimizer, config.optimizer) in GUARDED
    return known and len(anchors) > 1 and not find_coverage(unwrapped(model)).uncovered


@contextmanager
def _in_precision_of(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Forward passes in the body run in the run's mixed precision."""
    with lent_to_accelerate(model):
        if config.mixed_precision not in (None, "no"):
            make_accelerator(config).prepare_model(model, device_placement=False)
        yield


@contextmanager
def _plain_attention(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """On CPUs in bf16 attention is computed plainly, whose backward pass is faster than SDPA's."""
    known: Any = unwrapped(model)
    kind = getattr(getattr(known, "config", None), "_attn_implementation", None)
    on_cpu = device_of(model).type == "cpu" and config.mixed_precision == "bf16"
    if kind != "sdpa" or not on_cpu or not hasattr(known, "set_attn_implementation"):
        yield
        return
    known.set_attn_implementation("eager")
    try:
        yield
    finally:
        known.set_attn_implementation(kind)


def _spread(total: int, count: int) -> list[int]:
    """``count`` indices over a whole data set, or all of fewer."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _like(examples: Sequence[data.Example], anchors: Anchors) -> list[data.Example]:
    """As many rows, of those as long as the anchors: a Fisher depends on the length."""
    lengths = [int(row.sum()) for row in anchors.batch().attention_mask]
    middle = sum(lengths) / len(lengths)
    nearest_first = sorted(examples, key=lambda row: abs(len(row.input_ids) - middle))
    return nearest_first[: len(anchors)]


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


def _mean_nll(model: nn.Module, batch: Batch) -> Tensor:
    inputs = dict(batch)
    labels = inputs.pop("labels")
    targets = (labels[:, 1:] != IGNORED).sum()
    return nll_sum(model(**inputs, use_cache=False).logits, labels) / targets
