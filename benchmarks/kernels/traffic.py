"""Bytes that kernels really load and store, counted in Triton's interpreter.

Needs ``TRITON_INTERPRET=1`` in the environment before Triton is imported. Lanes that a mask
switches off do not count. Every access is booked on the kernel and the tensor whose storage it
falls into, so that weights, moments and factors can be told apart:

- ``loaded`` and ``stored`` count every access: what the L2 cache and above must deliver;
- ``distinct_loaded`` and ``distinct_stored`` count an address once a launch: what memory must
  deliver if a launch finds what it reads again in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import getcallargs
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
import triton
from triton.runtime import interpreter

ELSEWHERE = "(elsewhere)"


@dataclass
class Access:
    """Bytes one tensor cost in one kernel, over all launches."""

    loaded: int = 0
    stored: int = 0
    distinct_loaded: int = 0
    distinct_stored: int = 0

    @property
    def distinct(self) -> int:
        """Bytes at distinct addresses, both directions."""
        return self.distinct_loaded + self.distinct_stored


@dataclass
class Traffic:
    """What was counted: (kernel, tensor) -> bytes, and launches by kernel."""

    accesses: dict[tuple[str, str], Access] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)

    def moved(self, *tensors: str) -> int:
        """Bytes loaded from and stored to tensors of these names, in any kernel."""
        return sum(access.loaded + access.stored for access in self._of(tensors))

    def distinct(self, *tensors: str) -> int:
        """Bytes at distinct addresses, summed over launches and directions."""
        return sum(access.distinct for access in self._of(tensors))

    def _of(self, tensors: tuple[str, ...]) -> list[Access]:
        return [access for (_, name), access in self.accesses.items() if name in tensors]


class _Launch:
    """Books the accesses of one launch."""

    def __init__(self, traffic: Traffic, kernel: str, tensors: Mapping[str, Any]) -> None:
        self._accesses = traffic.accesses
        self._kernel = kernel
        self._touched: dict[tuple[str, str], list[npt.NDArray[np.uint64]]] = {}
        self._ranges = [
            (name, *_address_range(value))
            for name, value in tensors.items()
            if isinstance(value, torch.Tensor) and value.numel()
        ]
        traffic.launches[kernel] = traffic.launches.get(kernel, 0) + 1

    def book(self, addresses: npt.NDArray[np.uint64], width: int, direction: str) -> None:
        """Add accesses of ``width`` bytes each."""
        rest = addresses
        for name, start, end in self._ranges:
            inside = (rest >= start) & (rest < end)
            self._add(name, rest[inside], width, direction)
            rest = rest[~inside]
        self._add(ELSEWHERE, rest, width, direction)

    def _add(
        self, name: str, addresses: npt.NDArray[np.uint64], width: int, direction: str
    ) -> None:
        if not addresses.size:
            return
        access = self._accesses.setdefault((self._kernel, name), Access())
        setattr(access, direction, getattr(access, direction) + addresses.size * width)
        # Each byte span is named by its first address: a tensor is read at one width.
        touched = self._touched.setdefault((name, direction), [])
        touched.append(np.stack([addresses, np.full_like(addresses, width)]))

    def close(self) -> None:
        """Count addresses that were touched more than once only once."""
        for (name, direction), pieces in self._touched.items():
            spans = np.unique(np.concatenate(pieces, axis=1), axis=1)
            access, field_name = self._accesses[self._kernel, name], f"distinct_{direction}"
            setattr(access, field_name, getattr(access, field_name) + int(spans[1].sum()))


def _address_range(tensor: torch.Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return start, start + (last + 1) * tensor.element_size()


@contextmanager
def counted(tensors: Mapping[str, torch.Tensor]) -> Iterator[Traffic]:
    """Count what every kernel launched in this block loads and stores.

    Args:
        tensors: what kernels reach through tables of pointers, by name; the tensors that a
            launch is given are known by the names of their arguments.

    Raises:
        RuntimeError: Triton does not interpret, so that nothing could be counted.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before the process starts")
    traffic = Traffic()
    launch: list[_Launch] = []
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store
    call = interpreter.GridExecutor.__call__

    def counting_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
        launch[-1].book(*_lanes(ptrs, mask), "loaded")
        return load(ptrs, mask, *rest)

    def counting_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launch[-1].book(*_lanes(ptrs, mask), "stored")
        return store(ptrs, value, mask, *rest)

    def counting_call(self: Any, *arguments: Any, **keywords: Any) -> None:
        known = {k: v for k, v in keywords.items() if k in self.arg_names}
        given = getcallargs(self.fn, *arguments, **known)
        launch.append(_Launch(traffic, self.fn.__name__, {**tensors, **given}))
        call(self, *arguments, **keywords)
        launch.pop().close()

    with (
        mock.patch.object(builder, "create_masked_load", counting_load),
        mock.patch.object(builder, "create_masked_store", counting_store),
        mock.patch.object(interpreter.GridExecutor, "__call__", counting_call),
    ):
        yield traffic


def _lanes(ptrs: Any, mask: Any) -> tuple[npt.NDArray[np.uint64], int]:
    """Addresses of the lanes that are on, and bytes per lane."""
    on = np.broadcast_to(mask.data, ptrs.data.shape)
    return ptrs.data[on], ptrs.get_element_ty().primitive_bitwidth // 8
