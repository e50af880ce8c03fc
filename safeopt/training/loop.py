"""The training loop: plain PyTorch on Accelerate, readable from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from safeopt import Anchors
from safeopt.diagnostics import Verdict
from safeopt.evaluation.generation import evaluating
from safeopt.files import write_text
from safeopt.integrations.accelerate import refuse_unsupported
from safeopt.optim.base import HoldsGuard
from safeopt.training import checkpoints, data, models, optimizers, probes
from safeopt.training.config import GUARDED, TrainConfig
from safeopt.training.launch import lent_to_accelerate, make_accelerator
from safeopt.training.loss import nll_sum
from safeopt.training.metrics import MetricsLog


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind.

    Args:
        model: The trained model, unwrapped; the object that was passed in, or its LoRA wrapper.
        steps: Optimizer steps made in total, those before a resume included.
        loss: Training loss of the last step, mean nats per target token.
        seconds: Wall-clock seconds of this call's steps, probes excluded.
        output_dir: Where everything was written.
    """

    model: nn.Module
    steps: int
    loss: float
    seconds: float
    output_dir: Path


def train(
    config: TrainConfig,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    rows: Sequence[data.Row] | None = None,
    *,
    anchors: Anchors | None = None,
    probe: probes.Probe | None = None,
) -> TrainResult:
    """Fine-tune a causal language model as ``config`` says.

    The loss of a step is the mean NLL over all target tokens of the step, whatever the number of
    processes and micro-batches, so 1 x 8 accumulation takes the same step as 8 x 1.

    Args:
        config: All options.
        model: A model in memory, trained in place; otherwise ``config.model_name_or_path``.
        tokenizer: Its tokenizer; otherwise loaded beside the model.
        rows: Training rows in memory; otherwise ``config.dataset``.
        anchors: Anchors in memory; otherwise ``config.anchors``, when the optimizer holds a guard.
        probe: Called as ``probe(model, step)`` before the first step, every
            ``config.eval_steps`` steps and after the last; its figures go into ``metrics.jsonl``.

    Raises:
        ValueError: Bad options, rows or anchors; nothing has been trained.
        FloatingPointError: The loss became NaN or infinite; the weights are those before that
            step, and the message names the last checkpoint.
    """
    return _Run(config, model, tokenizer, rows, anchors, probe).train()


class _Run:
    """State of one run; `train` is its whole life."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module | None,
        tokenizer: Any,
        rows: Sequence[data.Row] | None,
        anchors: Anchors | None,
        probe: probes.Probe | None,
    ) -> None:
        self.config = config
        optimizers.optimizer_options(config)  # a wrong one fails before anything is loaded
        self.accelerator = make_accelerator(config)
        self.tokenizer = models.load_tokenizer(config) if tokenizer is None else tokenizer
        self.probes = [*([probe] if probe else []), *probes.from_config(config, self.tokenizer)]
        self.examples = self._tokenize(data.required_rows(config.dataset, rows))
        self.plan = data.BatchPlan(len(self.examples), self._rows_per_step(), config.seed)
        self.steps = config.planned_steps(len(self.examples), self.plan.rows_per_step)
        self.output_dir = Path(config.output_dir)
        set_seed(config.seed)
        bare = models.load_model(config) if model is None else model
        self.bare = models.prepare_for_training(bare, config)
        self.anchors = self._anchors(anchors)
        self.monitor = probes.monitor(config, self.anchors, self.steps, self._monitored_task())
        self.probes += [self.monitor] if self.monitor is not None else []
        main = self.accelerator.is_main_process
        self.log = MetricsLog(self.output_dir / "metrics.jsonl" if main else None)
        self.step, self.tokens, self.loss = 0, 0, math.nan
        self.is_guarded = config.monitor != "guard"

    def _monitored_task(self) -> Callable[[nn.Module], Tensor] | None:
        """The task loss of the present step's first rows, where its curvature can be had."""
        full = all(p.dtype == torch.float32 for p in self.bare.parameters() if p.requires_grad)
        return self._task_loss if full and self.accelerator.num_processes == 1 else None

    def _task_loss(self, model: nn.Module) -> Tensor:
        rows = self.plan.indices(min(self.step, self.steps - 1))
        chosen = [self.examples[i] for i in rows[: self.config.per_device_train_batch_size]]
        return self._nll_sum(model, chosen) / sum(example.targets for example in chosen)

    def _tokenize(self, rows: Sequence[data.Row]) -> list[data.Example]:
        options = self.config.max_length, self.config.completion_only_loss
        return data.tokenize(rows, self.tokenizer, *options)

    def _rows_per_step(self) -> int:
        config, processes = self.config, int(self.accelerator.num_processes)
        return config.per_device_train_batch_size * config.gradient_accumulation_steps * processes

    def _anchors(self, anchors: Anchors | None) -> Anchors | None:
        if anchors is not None or self.config.anchors is None:
            return anchors
        return Anchors.from_jsonl(self.config.anchors, self.tokenizer)

    def _prepare(self) -> None:
        self.bare.to(self.accelerator.device)
        self.bare.train()
        self._prepare_parts()
        self.scheduler = get_scheduler(
            self.config.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=self.config.warmup_steps,
            num_training_steps=self.steps,
        )
        self.accelerator.register_for_checkpointing(self.scheduler)
        for part in (self.guard, self.monitor):
            if part is not None:
                self.accelerator.register_for_checkpointing(part)

    def _prepare_parts(self) -> None:
        if self.config.optimizer in GUARDED:
            refuse_unsupported(self.accelerator.state)
        # Under FSDP2 Accelerate shards model and optimizer together. The guard comes last: it then
        # measures the anchors in the precision that trains, and sees which processes train.
        self.holder = optimizer = optimizers.build_optimizer(self.bare, self.config)
        self.model, self.optimizer = self.accelerator.prepare(self.bare, optimizer)
        self.guard = optimizers.build_guard(self.model, self.anchors, self.config)
        if self.is_guarded:
            self._hold_guard()

    def _hold_guard(self) -> None:
        self.is_guarded = True
        if isinstance(self.holder, HoldsGuard) and self.guard is not None:
            self.holder.hold(self.guard)

    def _heed_monitor(self) -> bool:
        """Whether the run is to end; puts it under its guard where that was asked for."""
        if self.monitor is None or self.monitor.verdict is not Verdict.NO_GO:
            return False
        if self.config.monitor == "guard":
            self._hold_guard()
        return self.config.monitor == "stop"

    def train(self) -> TrainResult:
        seconds = 0.0
        undone = models.checkpointing_undone(self.bare, self.config)
        with lent_to_accelerate(self.bare), undone:
            self._prepare()
            self._start()
            for step in self._progress():
                seconds += self._timed_step(step)
                if self._heed_monitor():
                    break
            self._finish()
        return TrainResult(self.bare, self.step, self.loss, seconds, self.output_dir)

    def _start(self) -> None:
        if self.config.resume_from_checkpoint is not None:
            self._resume(checkpoints.find(self.output_dir, self.config.resume_from_checkpoint))
        elif checkpoints.checkpoints(self.output_dir):
            raise ValueError(
                f"{self.output_dir} holds checkpoints of an earlier run; set "
                "resume_from_checkpoint=latest, or choose another output_dir"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            checkpoints.set_aside(self.output_dir, self.step)
            self._write_config()
            self.log.start(self.step)
        if self.step == 0 and self.probes:
            self.log.append({"step": 0, **self._probe()})

    def _write_config(self) -> None:
        resolved = self.config.to_dict()
        if self.guard is not None:
            resolved["guard"] = optimizers.guard_options(self.config)
        write_text(self.output_dir / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))

    def _progress(self) -> Iterator[int]:
        shown = self.config.progress and self.accelerator.is_main_process
        hidden = None if shown else True  # None: shown on a terminal only
        with tqdm(total=self.steps, initial=self.step, disable=hidden, unit="step") as bar:
            for step in range(self.step, self.steps):
                yield step
                bar.set_postfix(loss=f"{self.loss:.3f}", refresh=False)
                bar.update()

    def _timed_step(self, step: int) -> float:
        start = time.perf_counter()
        metrics = self._train_step(step)
        seconds = time.perf_counter() - start
        due = self.step % self.config.logging_steps == 0 or self.step == self.steps
        probed = self._probe() if self._probe_due() else {}
        if due or probed:
            self.log.append({"step": self.step, **metrics, "step_seconds": seconds, **probed})
        if self.config.save_steps and self.step % self.config.save_steps == 0:
            self._save_checkpoint()
        return seconds

    def _train_step(self, step: int) -> dict[str, float]:
        rate = float(self.scheduler.get_last_lr()[0])
        loss, tokens = self._backward(step)
        grad_norm = self._clip()
        if self.accelerator.scaler is None:  # a scaler skips such a step by itself
            self._stop_if_not_finite("gradient norm", grad_norm, step)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.step, self.loss = step + 1, loss
        self.tokens += tokens
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "num_tokens": self.tokens,
            "epoch": self.step * self.plan.rows_per_step / self.plan.rows,
            **(self.guard.metrics() if self.guard is not None else {}),
        }

    def _backward(self, step: int) -> tuple[float, int]:
        """Gradients of the step's mean NLL; returns that NLL and the tokens seen."""
        batch = [self.examples[i] for i in self.plan.indices(step)]
        targets = sum(example.targets for example in batch)
        processes = self.accelerator.num_processes
        total = torch.zeros((), device=self.accelerator.device)
        micro_batches = self._micro_batches(batch)
        for number, micro in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._nll_sum(self.model, micro) / targets
                # Processes average their gradients, while the loss is a sum over processes.
                self.accelerator.backward(loss * processes)
            total += loss.detach()
        value = float(self.accelerator.reduce(total, reduction="sum"))
        self._stop_if_not_finite("loss", value, step)
        return value, sum(len(example.input_ids) for example in batch)

    def _micro_batches(self, batch: list[data.Example]) -> list[list[data.Example]]:
        """This process's share of the step's rows."""
        size = self.config.per_device_train_batch_size
        chunks = [batch[i : i + size] for i in range(0, len(batch), size)]
        return chunks[self.accelerator.process_index :: self.accelerator.num_processes]

    def _nll_sum(self, model: nn.Module, examples: list[data.Example]) -> Tensor:
        pad = self.tokenizer.pad_token_id
        batch = data.collate(examples, 0 if pad is None else pad)
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        return nll_sum(model(**batch, use_cache=False).logits, labels)

    def _stop_if_not_finite(self, what: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        self.optimizer.zero_grad()
        saved = checkpoints.checkpoints(self.output_dir)
        hint = f"resume from {saved[-1]}" if saved else "no checkpoint was saved"
        rows = self.plan.indices(step)
        raise FloatingPointError(
            f"the {what} became {value} at step {step + 1} (rows {rows[:8]}...); this step was not "
            f"taken; {hint}. Lower learning_rate, or check those rows and the model's precision"
        )

    def _clip(self) -> float:
        limit = self.config.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        return float(norm) if norm is not None else math.nan

    def _probe_due(self) -> bool:
        every = self.config.eval_steps
        last = self.step == self.steps
        return bool(self.probes) and (last or bool(every and self.step % every == 0))

    def _probe(self) -> dict[str, float]:
        bare = self.accelerator.unwrap_model(self.model)
        figures: dict[str, float] = {}
        with evaluating(bare):
            for probe in self.probes:
                figures |= probe(bare, self.step)
        return figures

    def _save_checkpoint(self) -> None:
        folder = self.output_dir / f"checkpoint-{self.step}"
        checkpoints.save_checkpoint(self.accelerator, folder, self._state())
        if self.accelerator.is_main_process:
            checkpoints.prune(self.output_dir, self.config.save_total_limit)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "num_tokens": self.tokens,
            "loss": self.loss,
            "rows_per_step": self.plan.rows_per_step,
            "seed": self.config.seed,
            "data": data.fingerprint(self.examples),
            "is_guarded": self.is_guarded,
        }

    def _resume(self, folder: Path) -> None:
        state, now = checkpoints.read_state(folder), self._state()
        for key, name in (
            ("data", "training rows"),
            ("rows_per_step", "rows per step"),
            ("seed", "seed"),
        ):
            if state[key] != now[key]:
                raise ValueError(f"{folder} was made with other {name}; resume with the same")
        self.accelerator.load_state(str(folder))
        self.step, self.tokens, self.loss = state["step"], state["num_tokens"], state["loss"]
        if state.get("is_guarded") and not self.is_guarded:
            self._hold_guard()  # the monitor had asked for it

    def _finish(self) -> None:
        self.accelerator.wait_for_everyone()
        if not self.config.save_model:
            return
        weights = self.accelerator.get_state_dict(self.model)
        if self.config.save_dtype is not None:
            dtype = getattr(torch, self.config.save_dtype)
            weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
        bare: Any = self.accelerator.unwrap_model(self.model)
        if self.accelerator.is_main_process:
            with checkpoints.moved_into(self.output_dir) as scratch:
                bare.save_pretrained(scratch, state_dict=weights)
                self.tokenizer.save_pretrained(scratch)
        self.accelerator.wait_for_everyone()
