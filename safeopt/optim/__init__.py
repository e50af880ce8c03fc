"""Optimizers that hold a guard."""

from safeopt.optim.adamw import SafeAdamW

__all__ = ["SafeAdamW"]
