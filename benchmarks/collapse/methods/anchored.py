"""What methods with anchors share: one budget of anchor passes, the aligned model, reply tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from benchmarks.collapse.methods.base import Setup, Spending, Training, plain_adamw
from benchmarks.collapse.suite import Batch
from safeopt.anchors import IGNORED, AnchorBatch


class AnchorBudget:
    """Deals anchors out of the pool without replacement, at a fixed number per step.

    A fractional rate is met on average: 3.2 gives 3, 3, 3, 3, 4. What a method looks at before it
    starts is taken off the steps, so that every method makes the same number of anchor passes.

    Args:
        setup: the run.
        anchors_per_step: forward-backwards of one anchor, per optimizer step.
        spent: where they are counted.
    """

    def __init__(self, setup: Setup, anchors_per_step: float, spent: Spending) -> None:
        self.anchors = setup.anchors
        self._device = next(setup.model.parameters()).device
        self._rate, self._steps, self._spent = anchors_per_step, 0, spent
        self._run_steps = setup.run.steps
        self._draw = torch.Generator().manual_seed(setup.seed)
        self._left: list[int] = []

    def spend_first(self, count: int) -> AnchorBatch:
        """Take ``count`` anchors, at most the pool, before the first step.

        Raises:
            ValueError: the run's budget does not hold so many.
        """
        count = min(count, len(self.anchors))
        if count > self._rate * self._run_steps:
            raise ValueError(
                f"{count} anchors at the start are more than the budget of "
                f"{self._rate * self._run_steps:.0f}; take fewer"
            )
        self._rate -= count / self._run_steps
        return self.deal(count)

    def accrue(self) -> int:
        """Count a step and say how many anchors it brings."""
        self._steps += 1
        return int(self._steps * self._rate) - int((self._steps - 1) * self._rate)

    def deal(self, count: int) -> AnchorBatch:
        """The next ``count`` anchors of the pool, reshuffled when it is used up."""
        while len(self._left) < count:
            self._left += torch.randperm(len(self.anchors), generator=self._draw).tolist()
        chosen, self._left = self._left[:count], self._left[count:]
        self._spent.anchor_rows += count
        return self.anchors.batch(chosen).to(self._device)

    def next(self) -> AnchorBatch | None:
        """One step's anchors; None in a step that brings none."""
        count = self.accrue()
        return self.deal(count) if count else None


class Anchored(Training):
    """AdamW on the task loss plus a penalty on the anchors that the step brings.

    Args:
        setup: the run.
        anchors_per_step: see `AnchorBudget`.
    """

    def __init__(self, setup: Setup, anchors_per_step: float) -> None:
        super().__init__(setup, plain_adamw(setup))
        self.budget = AnchorBudget(setup, anchors_per_step, self.spent)

    def penalty(self, anchors: AnchorBatch) -> Tensor:
        """What is added to the task loss, with gradient."""
        raise NotImplementedError

    def gradients(self, batch: Batch) -> dict[str, float]:
        """Gradient of the task loss plus the penalty."""
        facts = super().gradients(batch)
        anchors = self.budget.next()
        if anchors is not None:
            penalty = self.penalty(anchors)
            penalty.backward()
            facts["penalty"] = penalty.item()
        return facts


class AlignedModel:
    """A frozen copy of the model as it was given."""

    def __init__(self, model: nn.Module, spent: Spending) -> None:
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._spent = spent

    @torch.no_grad()
    def reply_logits(self, batch: Batch) -> Tensor:
        """See `reply_logits`."""
        self._spent.forward_rows += len(batch["input_ids"])
        return reply_logits(self._model, batch)


def inputs(anchors: AnchorBatch) -> Batch:
    """An anchor batch as a model's keyword arguments."""
    return {
        "input_ids": anchors.input_ids,
        "attention_mask": anchors.attention_mask,
        "labels": anchors.labels,
    }


def reply_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of the predicted reply tokens of all rows, one below the other, (R, V), fp32."""
    rows, columns = reply_positions(batch)
    passed = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits: Tensor = model(**passed).logits
    chosen = logits[rows, columns]
    return chosen.float() if chosen.dtype in (torch.bfloat16, torch.float16) else chosen


def reply_targets(batch: Batch) -> Tensor:
    """The reply tokens that `reply_logits` predict, (R,)."""
    rows, columns = reply_positions(batch)
    return batch["labels"][rows, columns + 1]


def reply_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row and position of every logit that predicts a reply token, (R,) each."""
    rows, columns = torch.nonzero(batch["labels"][:, 1:] != IGNORED, as_tuple=True)
    return rows, columns


def kl(aligned: Tensor, current: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(aligned) || softmax(current)), nats; logits (R, V)."""
    reference, own = aligned.log_softmax(-1), current.log_softmax(-1)
    return (reference.exp() * (reference - own)).sum(-1).mean()


def own_gradients(model: nn.Module, anchors: AnchorBatch) -> Iterator[Mapping[str, Tensor]]:
    """Each anchor's gradient of its mean reply NLL, by name of the trainable parameter."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = inputs(anchors)
    for i in range(len(anchors)):
        loss = model(**{key: tensor[i : i + 1] for key, tensor in whole.items()}).loss
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        yield {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(trained.items(), found, strict=True)
        }
