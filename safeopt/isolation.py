"""Running a model without leaving a trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from safeopt.distributed import reshard


@contextmanager
def undisturbed(model: nn.Module, *, reentrant: bool = False) -> Iterator[None]:
    """Run the body in eval mode and restore modes, buffers and RNG state, also on errors.

    Compiled modules run as they are written, since compiled code does not see new hooks, and
    reentrant activation checkpointing is off, since it allows no ``torch.autograd.grad``.

    Args:
        model: the model.
        reentrant: leave reentrant checkpointing on, for a plain ``backward()``.
    """
    checkpoints = nullcontext() if reentrant else _without_reentrant_checkpoints()
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), _uncompiled(), checkpoints:
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)
        reshard(model)


@contextmanager
def own_gradients(model: nn.Module) -> Iterator[None]:
    """Leave ``p.grad`` of what trains empty inside and as it was outside, also on errors."""
    held = [(p, p.grad) for p in model.parameters() if p.requires_grad]
    try:
        for p, _ in held:
            p.grad = None
        yield
    finally:
        for p, gradient in held:
            p.grad = gradient


@contextmanager
def autocast(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Cast on these devices of the model, to these dtypes, and on none beside them.

    ``autocast(model, {})`` computes in the weights' own precision.
    """
    with ExitStack() as stack:
        for device in autocasts(model):
            if device not in dtypes:
                stack.enter_context(torch.autocast(device, enabled=False))
        for device, dtype in dtypes.items():
            stack.enter_context(torch.autocast(device, dtype))
        yield


def autocasts(model: nn.Module) -> dict[str, torch.dtype]:
    """Where torch casts at present, among the model's devices, and to what."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    able = [kind for kind in kinds if torch.amp.is_autocast_available(kind)]
    casting = [kind for kind in able if torch.is_autocast_enabled(kind)]
    # A step asks, and walks no model where nothing casts.
    devices = {p.device.type for p in model.parameters()} if casting else set()
    return {kind: torch.get_autocast_dtype(kind) for kind in casting if kind in devices}


def _uncompiled() -> Any:
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it is slow
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


class _NoCheckpoint:
    """Stands in for ``torch.utils.checkpoint.CheckpointFunction``: keeps the activations."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *inputs: Any) -> Any:
        return function(*inputs)


@contextmanager
def _without_reentrant_checkpoints() -> Iterator[None]:
    # Models that follow transformers' layers switch it off in eval mode by themselves; for the
    # rest, torch has no switch but this name.
    checkpoint: Any = torch.utils.checkpoint
    original = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _NoCheckpoint
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = original
