"""The Accelerate training loop behind the recipes."""

from __future__ import annotations

from safeopt.training.config import TrainConfig, from_mapping, parse_args
from safeopt.training.loop import TrainResult, train
from safeopt.training.probes import Probe

__all__ = ["Probe", "TrainConfig", "TrainResult", "from_mapping", "parse_args", "train"]
