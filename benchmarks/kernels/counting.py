"""Launches and bytes of plain torch code, in eager mode and compiled, counted and not timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.scheduler import Scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that only describe a tensor anew, or reserve memory without filling it.
_FREE = {"aten::detach", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::_unsafe_view"}


@dataclass(frozen=True)
class Cost:
    """What one call costs at least, every operation reading its inputs and writing its outputs.

    Attributes:
        launches: operations that start work.
        bytes: read and written, each tensor once an operation.
    """

    launches: int
    bytes: int


class _Counted(Exception):  # noqa: N818 - no error: it ends a compilation early
    """The compiled graph has been counted."""


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not func.is_view and name not in _FREE:
            self.launches += 1
            inputs = {_place(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            changed = (result, _changed(func, args))
            outputs = {_place(t): t for t in tree_leaves(changed) if isinstance(t, Tensor)}
            self.bytes += sum(_nbytes(t) for t in (*inputs.values(), *outputs.values()))
        return result


def _changed(func: Any, args: Sequence[Any]) -> list[Any]:
    """The arguments that an operation writes to; many return nothing."""
    declared = zip(func._schema.arguments, args, strict=False)
    return [value for a, value in declared if a.alias_info is not None and a.alias_info.is_write]


def _place(tensor: Tensor) -> tuple[int, int, int]:
    """Where a tensor's elements lie: a matrix and its transpose are read once, as one."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel()


def eager(function: Callable[..., Any], *arguments: Any) -> Cost:
    """Count a call operation by operation; with meta tensors nothing is computed."""
    with _Counter() as counter:
        function(*arguments)
    return Cost(counter.launches, counter.bytes)


def compiled(function: Callable[..., Any], *arguments: Any) -> Cost:
    """Count the kernels and library calls that `torch.compile` makes of a call."""
    costs: list[Cost] = []

    def recording(self: Scheduler) -> None:
        sizes = [node.get_read_write_buffers_sizes() for node in self.nodes]
        costs.append(Cost(sum(size > 0 for size in sizes), sum(sizes)))
        raise _Counted  # the schedule is all that is wanted: no code, no run

    torch._dynamo.reset()
    with (
        mock.patch.object(Scheduler, "codegen", recording),
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
        contextlib.suppress(BackendCompilerFailed, _Counted),
    ):
        torch.compile(function, dynamic=False, fullgraph=True)(*arguments)
    torch._dynamo.reset()
    (cost,) = costs
    return cost


def _nbytes(tensor: Tensor) -> int:
    # An expanded tensor is read once, however often it is looked at.
    held = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return int(torch.Size(held).numel()) * tensor.element_size()
