"""Safe LoRA: after training, project the adapters that left the alignment direction back into it.

Source: Safe LoRA (Hsu et al. 2024, arXiv 2405.16833). With V = W_aligned - W_base and
C = V V^T / ||V||_F, replace B by C B in every layer where cos(C B A, B A) is below a threshold; 0.5
in the authors' code, which alternatively takes the ten lowest of all layers.

Fidelity: the threshold form. Training is plain AdamW; the projection is applied whenever the model
is evaluated. Needs the model before alignment, no safety data.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.collapse.lora import Adapter
from benchmarks.collapse.methods.alignment import alignment_matrices
from benchmarks.collapse.methods.base import Method, Setup, Training, plain_adamw


class SafeLoRA(Training):
    """AdamW; what ships are the adapters after projection.

    Args:
        setup: the run.
        threshold: adapters whose cosine is below it are projected.
    """

    def __init__(self, setup: Setup, threshold: float = 0.5) -> None:
        super().__init__(setup, plain_adamw(setup))
        self._threshold, self._matrices = threshold, alignment_matrices(setup)

    @contextmanager
    def deployed(self) -> Iterator[None]:
        """The projected adapters in place of the trained ones."""
        trained = [adapter.B.detach().clone() for adapter, _ in self._matrices]
        try:
            for adapter, matrix in self._matrices:
                project(adapter, matrix, self._threshold)
            yield
        finally:
            with torch.no_grad():
                for (adapter, _), B in zip(self._matrices, trained, strict=True):
                    adapter.B.copy_(B)


@torch.no_grad()
def project(adapter: Adapter, matrix: Tensor, threshold: float) -> bool:
    """B <- C B if cos(C B A, B A) < threshold; says whether it did."""
    change = adapter.change()
    projected = matrix @ change
    cosine = torch.cosine_similarity(projected.flatten(), change.flatten(), dim=0)
    if cosine >= threshold:
        return False
    adapter.B.copy_(matrix @ adapter.B)
    return True


def build(setup: Setup) -> Method:
    """Options: ``threshold``."""
    return SafeLoRA(setup, **setup.options)
