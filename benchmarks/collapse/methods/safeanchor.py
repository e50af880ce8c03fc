"""Static Fisher projection: attenuate the gradient in a frozen Fisher eigenspace of each tensor.

Source: SafeAnchor (2026, arXiv 2604.17691). Per tensor F = mean g g^T over safety examples, V its
eigenvectors up to 90 % of the trace; g <- g - (1 - a) V V^T g with a = max(0, 1 - lambda tr F),
lambda 0.5; plus 0.1 times the KL to the aligned model on safety examples.

Fidelity: F from single anchors' gradients, through their small Gram matrix, so that no n x n matrix
is formed (the published code forms them). The anchor term's gradient is not projected, as the text
says (the code projects it). The projection acts before AdamW's moments, as in the source. One
domain, so bases are not re-estimated, and there is no corrective replay. ``hard`` sets a to 0: the
whole projection, whatever lambda. Made for adapters: for full fine-tuning of a large model the
bases do not fit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.collapse.methods.anchored import (
    AlignedModel,
    Anchored,
    inputs,
    kl,
    own_gradients,
    reply_logits,
)
from benchmarks.collapse.methods.base import Method, Setup, Training
from benchmarks.collapse.suite import Batch
from safeopt.anchors import AnchorBatch

_ENERGY = 0.9


class StaticFisher(Anchored):
    """AdamW on the attenuated task gradient plus the anchor term.

    Args:
        setup: the run.
        anchors_per_step: the budget, ``fisher_anchors`` included.
        fisher_anchors: anchors of the Fisher estimate.
        strength: lambda.
        anchor_weight: weight of the KL term.
        hard: remove the eigenspace whole.
    """

    def __init__(
        self,
        setup: Setup,
        anchors_per_step: float,
        fisher_anchors: int = 128,
        strength: float = 0.5,
        anchor_weight: float = 0.1,
        hard: bool = False,
    ) -> None:
        super().__init__(setup, anchors_per_step)
        self._weight, self._aligned = anchor_weight, AlignedModel(setup.model, self.spent)
        spaces = fisher_spaces(setup.model, self.budget.spend_first(fisher_anchors))
        self.bases = [basis for basis, _ in spaces]
        self.removed = [1.0 if hard else min(1.0, strength * trace) for _, trace in spaces]

    def penalty(self, anchors: AnchorBatch) -> Tensor:
        """The anchor term."""
        batch = inputs(anchors)
        return self._weight * kl(self._aligned.reply_logits(batch), reply_logits(self.model, batch))

    def gradients(self, batch: Batch) -> dict[str, float]:
        """Attenuated task gradient plus the anchor term's."""
        facts = Training.gradients(self, batch)
        for p, basis, share in zip(self.parameters, self.bases, self.removed, strict=True):
            if p.grad is not None:
                flat = p.grad.flatten()
                p.grad = (flat - share * (basis @ (basis.T @ flat))).view_as(p)
        anchors = self.budget.next()
        if anchors is not None:
            self.penalty(anchors).backward()
        return facts | {"removed_share": sum(self.removed) / len(self.removed)}


def fisher_spaces(model: nn.Module, anchors: AnchorBatch) -> list[tuple[Tensor, float]]:
    """Per trainable tensor of n elements: eigenvectors (n, k) and trace of mean g g^T.

    With G (N, n) the anchors' gradients, G G^T / N has the same spectrum; an eigenvector u of it
    gives G^T u / ||G^T u||.
    """
    stacked: dict[str, list[Tensor]] = {}
    for gradients in own_gradients(model, anchors):
        for name, gradient in gradients.items():
            stacked.setdefault(name, []).append(gradient.flatten())
    return [_space(torch.stack(rows)) for rows in stacked.values()]


def _space(G: Tensor) -> tuple[Tensor, float]:
    gram = (G @ G.T).double() / len(G)
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    trace = float(values.sum())
    if trace == 0:
        return G.new_zeros(G.shape[1], 0), 0.0
    count = int((values.cumsum(0) / trace < _ENERGY).sum()) + 1
    basis: Tensor = torch.linalg.qr(G.T @ vectors[:, :count].to(G.dtype)).Q
    return basis, trace


def build(setup: Setup) -> Method:
    """Options: the keywords of `StaticFisher`."""
    return StaticFisher(setup, **setup.options)
