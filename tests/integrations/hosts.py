"""The run of `tests.integrations.loops` in Trainer, SFTTrainer and Lightning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import Dataset

import safeopt
from safeopt.integrations.lightning import GuardCallback as LightningGuardCallback
from safeopt.integrations.transformers import GuardCallback, SafeAdamWFactory
from tests.integrations.loops import (
    CLIP,
    OPTIONS,
    ROWS_PER_STEP,
    STEPS,
    Weights,
    decayed,
    loader,
    make_guard,
    make_model,
    rows,
    weights,
)


def trainer_options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS_PER_STEP // int(os.environ.get("WORLD_SIZE", "1")),
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def make_trainer(
    model: nn.Module, guard: safeopt.Guard, folder: Path, *callbacks: Any, **options: Any
) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(**{**trainer_options(folder), **options}),
        train_dataset=rows(),
        optimizer_cls_and_kwargs=(SafeAdamWFactory, {**OPTIONS, "guard": guard}),
        callbacks=[GuardCallback(guard), *callbacks],
    )


def trainer(model: nn.Module, guard: safeopt.Guard, folder: Path) -> None:
    make_trainer(model, guard, folder).train()


def trainer_and_resumed(kind: str, folder: Path) -> tuple[Weights, Weights]:
    """Weights of a whole run, and of one that resumes it at step 7; for one process of several."""
    finished = []
    for checkpoint in (None, str(folder / "checkpoint-7")):
        model = make_model(kind)
        guard = make_guard(model)
        saving = {"save_strategy": "steps", "save_steps": 7, "ddp_backend": "gloo"}
        trainer = make_trainer(model, guard, folder, **saving)
        assert trainer.accelerator.num_processes == int(os.environ["WORLD_SIZE"])
        trainer.train(resume_from_checkpoint=checkpoint)
        finished.append(weights(model))
    return finished[0], finished[1]


def make_sft_trainer(
    model: nn.Module, guard: safeopt.Guard, folder: Path, tokenizer: Any, **options: Any
) -> SFTTrainer:
    skip = {"skip_prepare_dataset": True}
    options = {**trainer_options(folder), **options}
    return SFTTrainer(
        model,  # type: ignore[arg-type]
        SFTConfig(**options, bf16=False, dataset_kwargs=skip),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(SafeAdamWFactory, {**OPTIONS, "guard": guard}),
        callbacks=[GuardCallback(guard)],
    )


def sft_trainer(model: nn.Module, guard: safeopt.Guard, folder: Path, tokenizer: Any) -> None:
    make_sft_trainer(model, guard, folder, tokenizer).train()


class Module(lightning.LightningModule):
    def __init__(self, model: nn.Module, guard: safeopt.Guard) -> None:
        super().__init__()
        self.model, self.guard = model, guard

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return safeopt.SafeAdamW(decayed(self.model), **OPTIONS, guard=self.guard)


def lightning_trainer(folder: Path, **options: Any) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return lightning.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "gradient_clip_val": CLIP,
            "enable_checkpointing": False,
            "default_root_dir": folder,
            **quiet,
            **options,
        }
    )


def in_lightning(model: nn.Module, guard: safeopt.Guard, folder: Path) -> None:
    model.train()  # Lightning trains a module in the mode in which it finds it
    trainer = lightning_trainer(folder, callbacks=[LightningGuardCallback(guard)])
    trainer.fit(Module(model, guard), loader())
