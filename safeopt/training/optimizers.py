"""AdamW, or SafeAdamW with its guard, from a config."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from safeopt import Anchors, Guard, SafeAdamW
from safeopt.training.config import TrainConfig, nearest


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Named parameter groups: matrices decay, norms and biases do not."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if weight_decay == 0.0:
        return [{"params": trained, "weight_decay": 0.0}]
    matrices = [(name, p) for name, p in trained if p.ndim >= 2]
    vectors = [(name, p) for name, p in trained if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def guard_options(config: TrainConfig) -> dict[str, Any]:
    """Keywords for `safeopt.Guard`, with its own defaults filled in.

    Raises:
        ValueError: A keyword is unknown; the message names the nearest one.
    """
    accepted = inspect.signature(Guard).parameters
    names = [name for name in accepted if name not in ("model", "anchors", "process_group")]
    for name in config.guard:
        if name not in names:
            raise ValueError(f"unknown guard option {name!r}{nearest(name, names)}")
    return {name: config.guard.get(name, accepted[name].default) for name in names}


def build_guard(model: nn.Module, anchors: Anchors | None, config: TrainConfig) -> Guard | None:
    """The guard of ``config`` for a prepared model, or ``None`` for plain AdamW.

    Raises:
        ValueError: ``safe_adamw`` without anchors.
    """
    if config.optimizer == "adamw":
        return None
    if anchors is None:
        raise ValueError("safe_adamw needs anchors: set `anchors` to a JSONL file, or pass them")
    return Guard(model, anchors, **guard_options(config))


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of ``config``; `safeopt.SafeAdamW` does not hold its guard yet."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    groups = parameter_groups(model, config.weight_decay)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else SafeAdamW
    return kind(groups, **options)
