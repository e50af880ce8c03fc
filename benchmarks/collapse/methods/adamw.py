"""AdamW, unguarded: what everyone runs."""

from __future__ import annotations

from benchmarks.collapse.methods.base import Method, Setup, Training, plain_adamw


def build(setup: Setup) -> Method:
    """Plain AdamW; it has no options of its own (a learning rate is part of the run)."""
    return Training(setup, plain_adamw(setup))
