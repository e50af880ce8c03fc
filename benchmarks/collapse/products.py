"""Products of bf16 matrices on a CPU without bf16 instructions.

There they are emulated, about four times slower than fp32 ones at the sizes of a training step.
A bf16 instruction multiplies bf16 factors, adds in fp32 and rounds the sum; an fp32 product of
widened factors, rounded at the end, is the same but for the order of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WORTH_ROWS = 32  # below, widening the weights costs more than the emulated product
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}


class WidenedProducts(TorchDispatchMode):
    """``A B`` of bf16 matrices on the CPU as ``bf16(fp32(A) fp32(B))``, from 32 rows of A on."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if func not in _PRODUCTS or not _worth(args[-2]):
            return func(*args, **(kwargs or {}))
        return func(*(matrix.float() for matrix in args), **(kwargs or {})).bfloat16()


def _worth(left: torch.Tensor) -> bool:
    small = left.shape[-2] < WORTH_ROWS
    return left.dtype == torch.bfloat16 and left.device.type == "cpu" and not small


def fast_bf16_products() -> AbstractContextManager[object]:
    """`WidenedProducts` where this CPU has no bf16 instructions, else nothing."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return nullcontext() if native else WidenedProducts()  # type: ignore[no-untyped-call]
