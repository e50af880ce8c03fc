"""What Safe LoRA and AsFT share: the alignment matrix of each adapted weight."""

from __future__ import annotations

from torch import Tensor

from benchmarks.collapse.lora import Adapter, adapters
from benchmarks.collapse.methods.base import Setup


def alignment_matrices(setup: Setup) -> list[tuple[Adapter, Tensor]]:
    """Every adapter with C = V V^T / ||V||_F, (out, out), of V = W_aligned - W_base.

    C is a Gram matrix and no projector: it also shrinks. That is how both sources define it.
    """
    base = dict(setup.base().named_parameters())
    return [
        (adapter, alignment_matrix(adapter.weight - base[f"{adapter.name}.weight"].detach()))
        for adapter in adapters(setup.model)
    ]


def alignment_matrix(V: Tensor) -> Tensor:
    """V V^T / ||V||_F."""
    matrix: Tensor = V @ V.T / V.norm().clamp(min=1e-12)
    return matrix
