"""One small run, as a loop of one's own: the same rows in the same order, the same guard."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import default_data_collator

import safeopt
from safeopt.integrations.accelerate import register
from tests.distributed.jobs import shard, whole
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
    return {name.replace("module.", ""): whole(p).clone() for name, p in model.named_parameters()}


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


def fully_sharded(model: nn.Module, guard: safeopt.Guard, folder: Path) -> None:
    """`plain` on this rank's part of every batch; ``fully_shard`` averages the gradients."""
    optimizer = safeopt.SafeAdamW(decayed(model), **OPTIONS, guard=guard)
    rank, size = dist.get_rank(), ROWS_PER_STEP // dist.get_world_size()
    for batch in loader():
        part = {name: rows[rank * size : (rank + 1) * size] for name, rows in batch.items()}
        model(**part).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


Host = Callable[[nn.Module, safeopt.Guard, Path], None]


def run(host: Host, kind: str, folder: Path) -> tuple[Weights, int]:
    """Train in a host; returns the weights and how often the guard has refreshed."""
    model = make_model(kind)
    if host is fully_sharded:
        shard(model)
    guard = make_guard(model)
    host(model, guard, folder)
    return weights(model), guard.refreshes


def run_on_cpu(host: Host, kind: str, folder: Path) -> tuple[Weights, int]:
    """`run` as one process of several."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return run(host, kind, folder)
