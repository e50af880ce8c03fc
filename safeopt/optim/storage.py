"""Weights narrower than fp32: how a step reads them, and how it writes what they cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from safeopt.distributed import local
from safeopt.optim.reference import Storage, chunks
from safeopt_kernels import reference as kernels
from safeopt_kernels.settings import ROUNDINGS, Rounding, Seed

_NARROW = (torch.bfloat16, torch.float16)
_NO_MOMENTS = ("step", "compensation")


@dataclass(frozen=True)
class Precision:
    """What happens to bf16 and fp16 weights beyond what torch does.

    Attributes:
        rounding: "nearest" as torch does it; "stochastic" rounds up or down by chance, so that
            small steps arrive on average (bf16 only); "kahan" keeps what rounding dropped in
            ``state["compensation"]`` and adds it to the next step.
        moments_dtype: torch.float32, or None for the dtype of the weights, as torch does it.
        seed: of stochastic rounding; the same on every process that holds the same weights.
    """

    rounding: Rounding = "nearest"
    moments_dtype: torch.dtype | None = None
    seed: int = 0

    @property
    def is_plain(self) -> bool:
        """True if torch's own step does it."""
        return self.rounding == "nearest" and self.moments_dtype is None

    def settle(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Give the moments of a narrow parameter the dtype that they keep between steps."""
        if self.moments_dtype is not None and parameter.dtype in _NARROW:
            _cast_moments(state, self.moments_dtype)

    def check(self, optimizer: Optimizer) -> None:
        """Raise if an option is unknown or does not suit the parameters.

        Raises:
            ValueError: and what to pass instead.
        """
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {ROUNDINGS}, got {self.rounding!r}")
        if self.moments_dtype not in (None, torch.float32):
            raise ValueError(
                "moments_dtype must be None (the dtype of the weights) or torch.float32, got "
                f"{self.moments_dtype}"
            )
        if self.is_plain:
            return
        if any(group.get("differentiable") for group in optimizer.param_groups):
            raise ValueError("differentiable=True needs rounding='nearest' and moments_dtype=None")
        dtypes = {p.dtype for group in optimizer.param_groups for p in group["params"]}
        if self.rounding == "stochastic" and torch.float16 in dtypes:
            raise ValueError(
                "stochastic rounding is for bfloat16 weights and these are float16: pass "
                "rounding='kahan'"
            )


class NarrowStorage(Storage):
    """Hands out narrow weights as fp32 copies and writes them back with the rounding asked for.

    Args:
        optimizer: whose parameters these are; must hold all its groups.
        precision: how to round.
    """

    def __init__(self, optimizer: Optimizer, precision: Precision) -> None:
        self._optimizer, self._precision = optimizer, precision
        ordered = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        self._numbers = {id(p): number for number, p in enumerate(ordered)}

    @cached_property
    def _steps(self) -> int:
        """Steps made by the parameter that has made the most."""
        return max((int(s["step"]) for s in self._optimizer.state.values() if s), default=0)

    def read(self, parameter: Tensor) -> Tensor:
        """The weights, with what rounding has dropped so far, in fp32."""
        if parameter.dtype not in _NARROW:
            return super().read(parameter)
        value = local(parameter).float()
        owed = self._optimizer.state.get(parameter, {}).get("compensation")
        return value if owed is None else value + local(owed)

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Store what `read` gave and a step has changed."""
        if parameter.dtype in _NARROW:
            self.store(parameter, value, 1)

    def store(self, parameter: Tensor, value: Tensor, turn: int) -> None:
        """Round a value into the parameter; ``turn`` sets a step's two roundings apart."""
        change = value - self.read(parameter)
        if not bool(change.any()):
            return
        # A parameter that never had a gradient has no state. It gets none here: an entry without
        # AdamW's own keys would break its next step and its checkpoints.
        p, state = local(parameter), self._optimizer.state.get(parameter, {})
        if self._precision.rounding == "kahan" and state:
            owed = local(state.setdefault("compensation", torch.zeros_like(parameter)))
            kernels.store_kahan(p, change, owed)
        elif self._precision.rounding == "stochastic":
            seed = Seed(self._precision.seed, int(state.get("step", self._steps)))
            number = 2 * self._numbers[id(parameter)] + turn
            rows = value.reshape(len(value) if value.ndim > 1 else 1, -1)
            p.copy_(kernels.stochastic_bfloat16(rows, seed, number).view_as(value))
        else:
            p.copy_(value)


def widened_step(
    optimizer: Optimizer,
    storage: NarrowStorage,
    precision: Precision,
    base_step: Callable[[], Any],
) -> None:
    """One step of the base optimizer with narrow weights lent to it in fp32.

    Args:
        optimizer: whose ``param_groups`` move, a few parameters at a time.
        storage: reads and writes the weights.
        precision: dtype of the moments between steps.
        base_step: the base optimizer's step.
    """
    groups = optimizer.param_groups
    try:
        for group in groups:
            for chunk in chunks([p for p in group["params"] if p.grad is not None]):
                with _lent(optimizer, chunk, storage, precision) as stand_ins:
                    optimizer.param_groups = [{**group, "params": stand_ins}]
                    base_step()
    finally:
        optimizer.param_groups = groups


@contextmanager
def _lent(
    optimizer: Optimizer, chunk: list[Tensor], storage: NarrowStorage, precision: Precision
) -> Iterator[list[Tensor]]:
    """fp32 stand-ins for narrow parameters: weights, gradients and moments."""
    if chunk[0].dtype not in _NARROW:
        yield chunk
        return
    stand_ins = [p.detach().float() for p in chunk]
    for p, w in zip(chunk, stand_ins, strict=True):
        local(w).copy_(storage.read(p))
        w.grad = None if p.grad is None else p.grad.float()
        _cast_moments(optimizer.state[p], torch.float32)
        optimizer.state[w] = optimizer.state[p]  # the same dict: what is made in it is kept
    try:
        yield stand_ins
        for p, w in zip(chunk, stand_ins, strict=True):
            storage.store(p, local(w), 0)
    finally:
        for p, w in zip(chunk, stand_ins, strict=True):
            del optimizer.state[w]
            _cast_moments(optimizer.state[p], precision.moments_dtype or p.dtype)


def _cast_moments(state: dict[str, Any], dtype: torch.dtype) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and key not in _NO_MOMENTS:
            state[key] = value.to(dtype)


def restore_moments(
    optimizer: Optimizer, state_dict: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Put back the moments that ``load_state_dict`` has cast to the dtype of narrow weights."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    held = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for number, p in zip(saved, held, strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            is_moment = isinstance(value, Tensor) and key not in _NO_MOMENTS
            if is_moment and value.is_floating_point() and p.dtype in _NARROW:
                optimizer.state[p][key] = value.to(p.device, dtype, copy=True)
