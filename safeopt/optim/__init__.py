"""Optimizers that hold a guard."""

from safeopt.optim.adamw import SafeAdamW
from safeopt.optim.muon import SafeMuon, muon_groups
from safeopt.optim.sgd import SafeSGD
from safeopt.optim.wrapper import GuardedOptimizer, guarded

__all__ = ["GuardedOptimizer", "SafeAdamW", "SafeMuon", "SafeSGD", "guarded", "muon_groups"]
