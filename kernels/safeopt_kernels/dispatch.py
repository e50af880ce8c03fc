"""Which implementation runs: one function decides, ``SAFEOPT_KERNELS`` overrides it.

``SAFEOPT_KERNELS`` is "auto" (Triton where it can run, the reference elsewhere), "reference", or
"triton", which raises where Triton cannot run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

VARIABLE = "SAFEOPT_KERNELS"
MODES = ("auto", "reference", "triton")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def mode() -> str:
    """The user's choice.

    Raises:
        ValueError: it is none of the three.
    """
    chosen = os.environ.get(VARIABLE, "auto")
    if chosen not in MODES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(MODES)}, got {chosen!r}")
    return chosen


def uses_triton(tensors: Sequence[Tensor]) -> bool:
    """Decide for a call on these tensors.

    Raises:
        RuntimeError: Triton was asked for by name and cannot run on them.
    """
    chosen = mode()
    if chosen == "reference":
        return False
    obstacle = obstacle_to_triton(tensors)
    if obstacle is not None and chosen == "triton":
        raise RuntimeError(
            f"{VARIABLE}=triton was asked for, but {obstacle}; "
            f"unset {VARIABLE} to fall back to the reference"
        )
    return obstacle is None


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
    if any(tensor.dtype not in _DTYPES for tensor in tensors):
        return "a tensor is none of float32, float16 and bfloat16"
    if not all(tensor.is_contiguous() for tensor in tensors):
        return "a tensor is not contiguous"
    return _obstacle_of_device(next(iter(devices), torch.device("cpu")))


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
