"""The optimizer of a config, and its guard."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from safeopt import Anchors, Guard, SafeAdamW, SafeMuon, SafeSGD
from safeopt.optim import muon_groups
from safeopt.training.config import GUARDED, OptimizerName, TrainConfig, nearest

KINDS: dict[OptimizerName, type[Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "safe_adamw": SafeAdamW,
    "sgd": torch.optim.SGD,
    "safe_sgd": SafeSGD,
    "safe_muon": SafeMuon,
}
# Constructor keywords that flags of their own set, and those flags.
_ALWAYS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
_BETAS = "adam_beta1 and adam_beta2"
_ADAMW = {**_ALWAYS, "betas": _BETAS, "eps": "adam_epsilon"}
_MUON = {
    **_ALWAYS,
    "adamw_betas": _BETAS,
    "adamw_eps": "adam_epsilon",
    "adamw_weight_decay": "weight_decay",
}
_FLAGS: dict[OptimizerName, dict[str, str]] = {
    "adamw": _ADAMW,
    "safe_adamw": _ADAMW,
    "sgd": _ALWAYS,
    "safe_sgd": _ALWAYS,
    "safe_muon": _MUON,
}
_ADAM_FLAGS = ("adam_beta1", "adam_beta2", "adam_epsilon")


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


def muon_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Named groups for Muon and for its AdamW; matrices decay, norms and biases do not."""
    found = []
    for group in muon_groups(model):
        for is_matrix in (True, False):
            part = [(name, p) for name, p in group["params"] if (p.ndim >= 2) is is_matrix]
            decay = weight_decay if is_matrix else 0.0
            if part:
                found.append({**group, "params": part, "weight_decay": decay})
    return found


def optimizer_options(config: TrainConfig) -> dict[str, Any]:
    """``config.optimizer_options`` as the constructor takes them.

    Raises:
        ValueError: An option is none of this optimizer's, or has a flag of its own; the message
            names the flag or the nearest option.
    """
    name, flags = config.optimizer, _FLAGS[config.optimizer]
    _check_adam_flags(config)
    hidden = {"params", "guard", "capturable", "differentiable", *flags}
    known = [word for word in inspect.signature(KINDS[name]).parameters if word not in hidden]
    for word in config.optimizer_options:
        if word in flags:
            raise ValueError(f"optimizer option {word!r}: set {flags[word]} instead")
        if word not in known:
            hint = nearest(word, known) or f"; it takes {', '.join(known)}"
            raise ValueError(f"{name} has no option {word!r}{hint}")
    options = dict(config.optimizer_options)
    if options.get("moments_dtype") == "float32":  # files and flags hold no dtypes
        options["moments_dtype"] = torch.float32
    return options


def _check_adam_flags(config: TrainConfig) -> None:
    if "adam_epsilon" in _FLAGS[config.optimizer].values():
        return
    for name in _ADAM_FLAGS:
        default = next(item.default for item in fields(TrainConfig) if item.name == name)
        if getattr(config, name) != default:
            raise ValueError(f"{config.optimizer} has no {name}: leave it out")


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
    """The guard of ``config`` for a prepared model, or ``None`` for an optimizer without one.

    Raises:
        ValueError: An optimizer that holds a guard, without anchors.
    """
    if config.optimizer not in GUARDED:
        return None
    if anchors is None:
        raise ValueError(
            f"{config.optimizer} needs anchors: set `anchors` to a JSONL file, or pass them"
        )
    return Guard(model, anchors, **guard_options(config))


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer of ``config``; one that can hold a guard does not hold it yet.

    Raises:
        ValueError: An option is unknown, out of range or of the wrong type.
    """
    kind: Any = KINDS[config.optimizer]
    betas, eps = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    options: dict[str, Any] = {"lr": config.learning_rate, **optimizer_options(config)}
    if config.optimizer == "safe_muon":
        groups = muon_parameter_groups(model, config.weight_decay)
        options |= {"adamw_betas": betas, "adamw_eps": eps}
    else:
        groups = parameter_groups(model, config.weight_decay)
        if kind in (torch.optim.AdamW, SafeAdamW):
            options |= {"betas": betas, "eps": eps}
    if kind is torch.optim.AdamW and "foreach" not in options:
        options = {"fused": True} | options  # torch itself loops over the parameters on CPUs
    try:
        optimizer: Optimizer = kind(groups, **options)
    except (TypeError, RuntimeError) as error:  # torch's checks of types and combinations
        raise ValueError(f"{config.optimizer} does not take these options: {error}") from error
    return optimizer
