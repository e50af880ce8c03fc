"""The Accelerate training loop behind the recipes."""

from __future__ import annotations

from safeopt.training.config import TrainConfig, from_mapping, parse_args
from safeopt.training.loop import TrainResult, train
from safeopt.training.probes import Probe
from safeopt.training.recipe import run_recipe

__all__ = [
    "Probe",
    "TrainConfig",
    "TrainResult",
    "from_mapping",
    "parse_args",
    "run_recipe",
    "train",
]
