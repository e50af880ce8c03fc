"""safeopt inside other people's training loops: one file per host, imported when it is used.

Trainer and TRL: `safeopt.integrations.transformers`. Accelerate: `safeopt.integrations.accelerate`.
Lightning: `safeopt.integrations.lightning`. A plain loop, DDP and PEFT need nothing from here.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "SafeAdamWFactory": "safeopt.integrations.transformers",
    "GuardCallback": "safeopt.integrations.transformers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
