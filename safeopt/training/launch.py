"""The `Accelerator` of a run, and the check that it sees what the launcher started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from safeopt.training.config import TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    """An `Accelerator` in the precision that ``config`` or ``accelerate launch`` asks for.

    Raises:
        RuntimeError: The launcher started several processes and Accelerate sees one: each would
            train alone on the same rows.
    """
    if AcceleratorState._shared_state:
        # A second run in one process may want another precision; the state is a singleton.
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and accelerator.num_processes == 1:
        raise RuntimeError(
            f"the launcher started {world} processes, but Accelerate sees only one, so each would "
            "train alone. On a machine without a GPU use: ACCELERATE_USE_CPU=true accelerate "
            f"launch --multi_gpu --num_processes {world} recipes/sft.py ..."
        )
    return accelerator


@contextmanager
def lent_to_accelerate(model: nn.Module) -> Iterator[None]:
    """Undo afterwards what ``Accelerator.prepare`` does to a model object.

    It wraps ``model.forward`` for mixed precision, and marks the model so that a second
    ``prepare`` does nothing: a model trained twice would lose its mixed precision unnoticed.
    ``unwrap_model`` takes the wrapper off, but transformers' own decorators with it.
    """
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: model.__dict__[name] for name in names if name in model.__dict__}
    try:
        yield
    finally:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)
