"""Null space: no matrix may change on the inputs that the anchors give it.

Sources: Gradient Projection Memory (Saha et al. 2021, arXiv 2103.09762), which projects the
gradient, and Adam-NSCL (Wang et al. 2021, arXiv 2103.07113), which projects Adam's whole step. With
X the inputs of a linear layer on the memory and U the leading eigenvectors of X X^T,
dW <- dW (I - U U^T), so that W x stays for every x in the span of U. GPM keeps eigenvectors up to a
share 0.97 of the energy.

Fidelity: energy of the uncentred covariance, summed over all tokens of the anchors, prompts
included. GPM takes plain SGD; here its projected gradient goes into AdamW, as in the ports to
language models. Adam-NSCL's transform U U^T / ||U U^T|| also shrinks the step by the root of the
rank; the exact projector here does not. What is no linear layer (embeddings, norms) is frozen:
otherwise the inputs would move and nothing would be kept. A forward pass over the pool is all the
safety data that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.collapse.methods.anchored import inputs
from benchmarks.collapse.methods.base import Displacement, Method, Setup, Training, plain_adamw
from benchmarks.collapse.suite import Batch
from safeopt import Anchors

_AT_ONCE = 32


class NullSpace(Training):
    """AdamW on the linear layers, on the complement of the anchors' inputs.

    Args:
        setup: the run.
        energy: share of the inputs' energy that may not be touched.
        place: project the "step" (Adam-NSCL) or the "gradient" (GPM).
    """

    def __init__(
        self,
        setup: Setup,
        energy: float = 0.97,
        place: Literal["step", "gradient"] = "step",
    ) -> None:
        layers = train_linear_layers_alone(setup.model)
        super().__init__(setup, plain_adamw(setup))
        covariances = input_covariances(setup.model, layers, setup.anchors)
        self.spent.forward_rows += len(setup.anchors)
        found = {layers[name].weight: leading(c, energy) for name, c in covariances.items()}
        self.bases = [found[p] for p in self.parameters]
        self._place = place
        self._displacement = Displacement(setup.model)

    def gradients(self, batch: Batch) -> dict[str, float]:
        """The task gradient, projected for GPM."""
        facts = super().gradients(batch)
        if self._place == "gradient":
            for p, basis in zip(self.parameters, self.bases, strict=True):
                if p.grad is not None:
                    p.grad = outside(p.grad, basis)
        return facts

    def step(self, batch: Batch) -> dict[str, float]:
        """One AdamW step, projected for Adam-NSCL."""
        self._displacement.start()
        facts = super().step(batch)
        if self._place == "step":
            taken = self._displacement.taken()
            kept = [outside(d, basis) for d, basis in zip(taken, self.bases, strict=True)]
            self._displacement.replace(kept)
        return facts


def outside(change: Tensor, basis: Tensor) -> Tensor:
    """The change dW (I - U U^T) for dW (out, in) and U (in, r)."""
    kept: Tensor = change - (change @ basis) @ basis.T
    return kept


def leading(covariance: Tensor, energy: float) -> Tensor:
    """Fewest eigenvectors with a share ``energy`` of the trace, (n, r)."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    shares = values.cumsum(0) / values.sum()
    count = int((shares < energy).sum()) + 1
    basis: Tensor = vectors[:, :count].float()
    return basis


def train_linear_layers_alone(model: nn.Module) -> dict[str, nn.Linear]:
    """Freeze everything but the weights of linear layers that are tied to no embedding."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and id(module.weight) not in embedded
    }
    kept = {id(layer.weight) for layer in layers.values()}
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and id(p) in kept)
    return layers


@torch.no_grad()
def input_covariances(
    model: nn.Module, layers: dict[str, nn.Linear], anchors: Anchors
) -> dict[str, Tensor]:
    """Sum of x x^T over the tokens of all anchors, by name of the layer, fp64."""
    sums = {
        name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)
        for name, layer in layers.items()
    }
    for start in range(0, len(anchors), _AT_ONCE):
        rows = anchors.batch(range(start, min(start + _AT_ONCE, len(anchors))))
        with _adding(layers, sums, rows.attention_mask.bool()):
            model(**inputs(rows))
    return sums


@contextmanager
def _adding(layers: dict[str, nn.Linear], sums: dict[str, Tensor], real: Tensor) -> Iterator[None]:
    def hook(name: str) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0][real].double()
            sums[name] += x.T @ x

        return add

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def build(setup: Setup) -> Method:
    """Options: ``energy``, ``place``."""
    return NullSpace(setup, **setup.options)
