"""The same anchors mixed into the batches, at a given number of anchors per step.

Source: Safety-Tuned LLaMAs (Bianchi et al. 2023, arXiv 2309.07875) and every practitioner.

Fidelity: the source mixes a few hundred demonstrations into the data set and shuffles; here every
batch gets its share, which is the same in expectation and the same for every method compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.collapse.methods.anchored import (
    AnchorBudget,
    inputs,
    reply_logits,
    reply_positions,
    reply_targets,
)
from benchmarks.collapse.methods.base import Method, Setup, Training, plain_adamw
from benchmarks.collapse.suite import Batch
from safeopt.anchors import IGNORED, AnchorBatch


class Mixed(Training):
    """AdamW on the task batch plus anchors drawn from the pool without replacement.

    The anchors are added, so every method sees the same task rows.

    Args:
        setup: the run.
        anchors_per_step: anchors added to a batch, met on average.
        weight: how much an anchor's token counts beside a task token; 1 is plain mixing.
    """

    def __init__(self, setup: Setup, anchors_per_step: float, weight: float = 1.0) -> None:
        super().__init__(setup, plain_adamw(setup))
        self._budget = AnchorBudget(setup, anchors_per_step, self.spent)
        self._weight = weight

    def gradients(self, batch: Batch) -> dict[str, float]:
        """Gradient of the mean over the tokens of task rows and this step's anchors."""
        anchors = self._budget.next()
        if anchors is None:
            return super().gradients(batch)
        loss = self._loss(joined(batch, anchors), len(batch["input_ids"]))
        loss.backward()
        self.spent.task_rows += len(batch["input_ids"])
        return {"loss": loss.item(), "safety_rows": float(len(anchors))}

    def _loss(self, rows: Batch, task_rows: int) -> Tensor:
        if self._weight == 1.0:
            loss: Tensor = self.model(**rows).loss
            return loss
        where, _ = reply_positions(rows)
        nll = torch.nn.functional.cross_entropy(
            reply_logits(self.model, rows), reply_targets(rows), reduction="none"
        )
        weights = torch.where(where < task_rows, 1.0, self._weight)
        return (weights * nll).sum() / weights.sum()


def joined(batch: Batch, anchors: AnchorBatch) -> Batch:
    """The task batch with the anchors below it, right-padded to one length."""
    rows = inputs(anchors)
    length = max(batch["input_ids"].shape[1], rows["input_ids"].shape[1])
    blank = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}

    def fit(tensor: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=fill)

    return {
        key: torch.cat([fit(batch[key], fill), fit(rows[key], fill)]) for key, fill in blank.items()
    }


def build(setup: Setup) -> Method:
    """AdamW with ``options["anchors_per_step"]`` anchors mixed in; ``weight``."""
    return Mixed(setup, **setup.options)
