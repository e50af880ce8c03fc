"""safeopt inside other people's training loops: one file per host, imported when it is used.

Trainer and TRL: `safeopt.integrations.transformers`. Accelerate: `safeopt.integrations.accelerate`.
Lightning: `safeopt.integrations.lightning`. A plain loop, DDP and PEFT need nothing from here.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOSTS = ("accelerate", "lightning", "transformers")
_FROM_TRANSFORMERS = ("GuardCallback", "SafeAdamWFactory")


def __getattr__(name: str) -> Any:
    if name in _HOSTS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FROM_TRANSFORMERS:
        return getattr(importlib.import_module(f"{__name__}.transformers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
