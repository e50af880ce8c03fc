"""Vectors over named parameters: tangent vectors, gradients and products of operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from safeopt.geometry.coverage import unwrapped

Vector = Mapping[str, Tensor]
Outputs = Callable[[nn.Module], Tensor]


def trainable_parameters(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Trainable parameters by name, wrappers of DDP and torch.compile looked through.

    Args:
        model: the model.
        names: the parameters wanted; all trainable ones by default.

    Raises:
        ValueError: nothing trains, or a name is not a trainable parameter.
    """
    found = {n: p for n, p in unwrapped(model).named_parameters() if p.requires_grad}
    if names is None:
        if not found:
            raise ValueError("no parameter requires a gradient: unfreeze what curvature is about")
        return dict(found)
    wanted = list(names)
    unknown = [name for name in wanted if name not in found]
    if unknown or not wanted:
        raise ValueError(
            f"not trainable parameters of the model: {unknown}; names are those of "
            "model.named_parameters()"
        )
    return {name: found[name] for name in wanted}


def check_vector(vector: Vector, parameters: Vector) -> None:
    """Raise unless ``vector`` has one tensor of the right shape per parameter.

    Raises:
        ValueError: missing or unknown names, or a shape that differs.
    """
    if set(vector) != set(parameters):
        odd = sorted(set(vector) ^ set(parameters))
        raise ValueError(f"a vector needs one tensor per parameter; missing or unknown: {odd}")
    for name, p in parameters.items():
        if vector[name].shape != p.shape:
            raise ValueError(
                f"the vector's {name!r} has shape {tuple(vector[name].shape)}, the parameter "
                f"{tuple(p.shape)}"
            )


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of tensors taken as one vector; of the whole vector where it is sharded."""
    squares = 0.0
    for tensor in tensors:
        part = torch.linalg.vector_norm(tensor.detach().float() if _is_half(tensor) else tensor)
        whole = part.full_tensor() if hasattr(part, "full_tensor") else part
        squares += float(whole) ** 2
    return math.sqrt(squares)


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def flatten(vector: Vector, parameters: Vector) -> Tensor:
    """Concatenate a vector in the order of ``parameters``, (P,)."""
    return torch.cat([vector[name].flatten() for name in parameters])


def unflatten(flat: Tensor, parameters: Vector) -> dict[str, Tensor]:
    """Split a flat vector (P,) into views, one per parameter."""
    parts = flat.split([p.numel() for p in parameters.values()])
    return {n: part.view(p.shape) for (n, p), part in zip(parameters.items(), parts, strict=True)}


@contextmanager
def restored(parameters: Vector) -> Iterator[dict[str, Tensor]]:
    """Yield a snapshot of the weights and write it back at the end, bit for bit, also on errors."""
    snapshot = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        yield snapshot
    finally:
        displace(parameters, snapshot)


def displace(
    parameters: Vector, origin: Vector, step: Vector | None = None, scale: float = 1.0
) -> None:
    """Set the weights to origin + scale * step."""
    with torch.no_grad():
        for name, p in parameters.items():
            old = origin[name]
            p.copy_(old if step is None else torch.add(old, step[name].to(p.dtype), alpha=scale))
