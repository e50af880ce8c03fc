"""One small run in every host: the same rows in the same order, the same guard, 20 steps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import Dataset

import safeopt
from safeopt.integrations.accelerate import register
from safeopt.integrations.lightning import GuardCallback as LightningGuardCallback
from safeopt.integrations.transformers import GuardCallback, SafeAdamWFactory
from tests.zoo import VOCABULARY, llama, random_anchors

STEPS, ROWS_PER_STEP = 20, 4
# An eps above the rounding noise of the losses, which hosts compute in fp32, each in its own way:
# AdamW would else turn noise in a gradient that is nearly zero into whole steps.
OPTIONS: dict[str, Any] = {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.01}
GUARD: dict[str, Any] = {"refresh_every": 10, "anchors_per_refresh": 4, "budget": -0.5}
CLIP = 1.0

Weights = dict[str, Tensor]


class CountingGuard(safeopt.Guard):
    """A guard that counts its refreshes."""

    refreshes = 0

    def refresh(self, names: frozenset[str] | None = None) -> None:
        super().refresh(names)
        self.refreshes += 1


def make_model(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = llama(pad_token_id=0).double()
        if kind == "full":
            return model
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


def make_guard(model: nn.Module) -> CountingGuard:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return CountingGuard(model, random_anchors(8), **GUARD)


def rows(steps: int = STEPS) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    shape = (steps * ROWS_PER_STEP, 10)
    ids = torch.randint(1, VOCABULARY, shape, generator=generator)
    # Trainer counts every label, but predicts none at the first place.
    labels = ids.clone()
    labels[:, 0] = -100
    return [
        {"input_ids": i, "attention_mask": [1] * len(i), "labels": label}
        for i, label in zip(ids.tolist(), labels.tolist(), strict=True)
    ]


def loader(batch_size: int = ROWS_PER_STEP, steps: int = STEPS) -> DataLoader[Any]:
    return DataLoader(rows(steps), batch_size=batch_size, collate_fn=default_data_collator)  # type: ignore


def weights(model: nn.Module) -> Weights:
    """All weights, under the names of the bare model."""
    return {name.replace("module.", ""): p.detach().clone() for name, p in model.named_parameters()}


def decayed(model: nn.Module) -> list[dict[str, Any]]:
    """The groups of Trainer, written out: norms do not decay, this model has no biases."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(n, p) for n, p in trained if "norm" not in n]},
        {"params": [(n, p) for n, p in trained if "norm" in n], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def plain(model: nn.Module, guard: safeopt.Guard | None, folder: Path) -> None:
    optimizer = safeopt.SafeAdamW(decayed(model), **OPTIONS, guard=guard)
    for batch in loader():
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


def accelerate(model: nn.Module, guard: safeopt.Guard, folder: Path) -> None:
    PartialState._reset_state()
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    optimizer = safeopt.SafeAdamW(decayed(model), **OPTIONS, guard=guard)
    batches = loader(ROWS_PER_STEP // accelerator.num_processes)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    register(accelerator, guard)
    for batch in batches:
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


def trainer_options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS_PER_STEP,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def trainer(model: nn.Module, guard: safeopt.Guard, folder: Path) -> None:
    Trainer(
        model,
        TrainingArguments(**trainer_options(folder)),
        train_dataset=rows(),
        optimizer_cls_and_kwargs=(SafeAdamWFactory, {**OPTIONS, "guard": guard}),
        callbacks=[GuardCallback(guard)],
    ).train()


def sft_trainer(model: nn.Module, guard: safeopt.Guard, folder: Path, tokenizer: Any) -> None:
    skip = {"skip_prepare_dataset": True}
    SFTTrainer(
        model,  # type: ignore[arg-type]
        SFTConfig(**trainer_options(folder), bf16=False, dataset_kwargs=skip),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(SafeAdamWFactory, {**OPTIONS, "guard": guard}),
        callbacks=[GuardCallback(guard)],
    ).train()


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


Host = Callable[[nn.Module, safeopt.Guard, Path], None]
HOSTS: dict[str, Host] = {
    "accelerate": accelerate,
    "trainer": trainer,
    "lightning": in_lightning,
}


def run(host: Host, kind: str, folder: Path) -> tuple[Weights, CountingGuard]:
    model = make_model(kind)
    guard = make_guard(model)
    host(model, guard, folder)
    return weights(model), guard


def worker(rank: int, world: int, port: int, host: str, kind: str, folder: Path) -> None:
    """One process of several: trains and leaves its weights behind."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    trained, guard = run(HOSTS[host], kind, folder)
    torch.save({"weights": trained, "refreshes": guard.refreshes}, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
