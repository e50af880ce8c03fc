"""Which implementation runs: one function decides, ``SAFEOPT_KERNELS`` overrides it.

``SAFEOPT_KERNELS`` is "auto" (Triton where it can run, C++ on CPUs with AVX2 or more, the reference
elsewhere), "reference", or "triton" or "native", which raise where they cannot run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from safeopt_kernels import native

VARIABLE = "SAFEOPT_KERNELS"
MODES = ("auto", "reference", "triton", "native")
# Weights that are worth compiling C++ for: with fewer, a step takes about a millisecond anyway.
PAYS = 1 << 20
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def mode() -> str:
    """The user's choice.

    Raises:
        ValueError: it is none of the four.
    """
    chosen = os.environ.get(VARIABLE, "auto")
    if chosen not in MODES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(MODES)}, got {chosen!r}")
    return chosen


def implementation(
    weights: Sequence[Tensor], others: Sequence[Tensor] = (), *, not_native: str | None = None
) -> str:
    """Decide for a call on these tensors: "triton", "native" or "reference".

    Args:
        weights: what the call steps.
        others: whatever else goes into it.
        not_native: why the call is none for C++, whatever the tensors.

    Raises:
        RuntimeError: an implementation was asked for by name and cannot run on them.
    """
    wanted, tensors = mode(), [*weights, *others]
    for name in ("triton", "native"):
        if wanted not in (name, "auto"):
            continue
        if name == "triton":
            obstacle = obstacle_to_triton(tensors)
        elif wanted == "auto" and sum(w.numel() for w in weights) < PAYS:
            obstacle = "it would not pay"
        else:
            obstacle = not_native or native.obstacle(tensors)
        if obstacle is None:
            return name
        if wanted == name:
            raise_unmet(name, obstacle)
    return "reference"


def is_native(tensors: Sequence[Tensor]) -> bool:
    """Whether C++ may look at these tensors where no one asks for it by name."""
    pays = sum(t.numel() for t in tensors) >= PAYS
    return pays and mode() in ("auto", "native") and native.obstacle(tensors) is None


def call(
    now: Callable[..., Any], operator: Callable[..., Any], changed: list[Tensor], *arguments: Any
) -> Any:
    """Call an operator, or what it does where nothing looks on: dispatch costs half a millisecond.

    Args:
        now: what the operator does.
        operator: it, for whoever traces or differentiates.
        changed: the tensors that it changes.
        arguments: all that it takes.
    """
    if torch.compiler.is_compiling() or _is_watched(changed):
        return operator(*arguments)
    result = now(*arguments)
    torch.autograd.graph.increment_version(changed)
    return result


def _is_watched(tensors: list[Tensor]) -> bool:
    """Whether autograd, a mode such as that of fake tensors, or a subclass wants the operator."""
    if torch.is_grad_enabled() or is_in_torch_dispatch_mode():
        return True
    return any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors)


def raise_unmet(name: str, obstacle: str) -> None:
    """Raise because of an implementation that was asked for by name.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"{VARIABLE}={name} was asked for, but {obstacle}; "
        f"unset {VARIABLE} to fall back to the reference"
    )


def check_local(tensors: Sequence[Tensor]) -> None:
    """Raise if a tensor is a DTensor: kernels work on the shard that is here."""
    if any(isinstance(tensor, DTensor) for tensor in tensors):
        raise TypeError("kernels work on local shards: pass tensor.to_local() of a DTensor")


def obstacle_to_triton(tensors: Sequence[Tensor]) -> str | None:
    """Why Triton cannot run on these tensors, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'safeopt-llm[kernels]')"
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        return f"the tensors lie on several devices ({', '.join(sorted(map(str, devices)))})"
    obstacle = _obstacle_of_device(next(iter(devices), torch.device("cpu")))
    if obstacle is not None:
        return obstacle
    if any(tensor.dtype not in _DTYPES for tensor in tensors):
        return "a tensor is none of float32, float16 and bfloat16"
    if not all(tensor.is_contiguous() for tensor in tensors):
        return "a tensor is not contiguous"
    return None


def _obstacle_of_device(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None if _is_interpreted() else "the tensors are on the CPU"
    if device.type != "cuda":
        return f"there are no kernels for the device type {device.type!r}"
    return _obstacle_of_gpu(device)


@functools.cache
def _obstacle_of_gpu(device: torch.device) -> str | None:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = str(properties.gcnArchName).split(":")[0]
        return None if name == "gfx942" else f"the GPU is {name} and not gfx942"
    if properties.major < 8:
        return f"the GPU is sm_{properties.major}{properties.minor}, older than sm_80"
    return None


def _is_interpreted() -> bool:
    from safeopt_kernels.lowrank import is_interpreted

    return is_interpreted()


def backend() -> str:
    """Triton's name for the kind of GPU in this machine: "cuda" or "hip"."""
    return "hip" if torch.version.hip else "cuda"
