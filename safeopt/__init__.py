"""Curvature-aware optimizers that keep a model's refusals while it is fine-tuned."""

from safeopt import integrations
from safeopt.anchors import Anchors
from safeopt.geometry import DenseSubspace, GradientSketch
from safeopt.guard import Guard
from safeopt.optim import SafeAdamW, SafeMuon, SafeSGD, guarded

__all__ = [
    "Anchors",
    "DenseSubspace",
    "GradientSketch",
    "Guard",
    "SafeAdamW",
    "SafeMuon",
    "SafeSGD",
    "__version__",
    "guarded",
    "integrations",
]

__version__ = "0.1.0"
