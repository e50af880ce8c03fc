"""Accelerate: what it can run with a guard, and the guard in its checkpoints."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from safeopt.guard import Guard
from safeopt.layouts import FSDP1, ZERO
from safeopt.passport.guard import PassportGuard


def register(accelerator: Accelerator, guard: Guard | PassportGuard) -> None:
    """Let ``save_state`` and ``load_state`` carry the guard along; call it after ``prepare``.

    ``prepare`` lets the model compute in the accelerator's mixed precision, in which its anchor
    losses differ a little, so a guard that has not been used yet measures its thresholds again.

    Optimizer and model go through ``accelerator.prepare`` as usual. The guard is no part of the
    optimizer's state, and `AcceleratedOptimizer` hides it, so keep the guard itself at hand:
    ``accelerator.log(guard.metrics(), step=step)`` writes its figures to the trackers.

    Args:
        accelerator: the run's accelerator.
        guard: the guard that the optimizer holds.

    Raises:
        ValueError: Accelerate runs DeepSpeed or FSDP1.
    """
    refuse_unsupported(accelerator.state)
    if accelerator.mixed_precision != "no" and isinstance(guard, Guard):
        guard.recalibrate()
    accelerator.register_for_checkpointing(guard)


def refuse_unsupported(state: AcceleratorState) -> None:
    """Raise if Accelerate is set up for DeepSpeed or FSDP1.

    Raises:
        ValueError: says why it cannot be guarded and what to use instead.
    """
    if state.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(ZERO)
    plugin = getattr(state, "fsdp_plugin", None)
    if state.distributed_type == DistributedType.FSDP and getattr(plugin, "fsdp_version", 1) == 1:
        raise ValueError(FSDP1)
