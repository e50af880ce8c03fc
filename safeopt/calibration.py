"""Calibration: what the anchor losses were at the aligned model, and how far they may rise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safeopt.anchors import AnchorBatch, Anchors
from safeopt.distributed import Ranks
from safeopt.geometry.capture import AnchorLoss, check_finite, logits_of
from safeopt.geometry.coverage import device_of
from safeopt.isolation import autocast, undisturbed
from safeopt.losses import ReplyDistribution, reply_distributions, reply_kl, reply_nll

Reference = Literal["nll", "kl"]


class Calibration:
    """Anchor losses l_i of a model and their thresholds tau_i = l_i(theta*) + budget.

    Args:
        model: the aligned model, unwrapped; measured at once.
        anchors: the anchors.
        budget: nats per token.
        reference: anchor loss, "nll" of the reply or "kl" from the aligned model on it.
        at_once: anchors in one forward pass.
        ranks: the processes that train the model; all of them keep the first one's thresholds.

    Attributes:
        budget: as given.
        at_once: as given.

    Raises:
        FloatingPointError: an anchor loss is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        anchors: Anchors,
        budget: float,
        reference: Reference,
        at_once: int,
        ranks: Ranks,
    ) -> None:
        self._model = model
        self._anchors = anchors
        self._reference = reference
        self.budget, self.at_once, self._ranks = budget, at_once, ranks
        self.renew()

    def renew(self) -> None:
        """Measure again; the weights must be the aligned ones still.

        Raises:
            FloatingPointError: an anchor loss is not finite.
        """
        self._aligned: list[ReplyDistribution] = []
        indices, at_once = range(len(self._anchors)), self.at_once
        if self._reference == "kl":
            for start in indices[::at_once]:
                batch = self.batch(indices[start : start + at_once])
                with undisturbed(self._model), autocast(self._model, {}), torch.no_grad():
                    logits = logits_of(self._model, batch)
                    self._aligned += reply_distributions(logits, batch.labels)
        losses = [self.measure(indices[start : start + at_once]) for start in indices[::at_once]]
        self.thresholds = self._ranks.same(torch.cat(losses).cpu()) + self.budget

    def batch(self, indices: Sequence[int]) -> AnchorBatch:
        """The anchors at ``indices``, padded together, on the model's device."""
        return self._anchors.batch(list(indices)).to(device_of(self._model))

    def loss(self, indices: Sequence[int]) -> AnchorLoss:
        """The anchor loss for exactly these anchors: logits and labels to losses (N,)."""
        if self._reference == "nll":
            return reply_nll
        aligned = [self._aligned[i] for i in indices]
        return lambda logits, labels: reply_kl(logits, labels, aligned)

    def measure(self, indices: Sequence[int]) -> Tensor:
        """Losses of these anchors at the present weights, (N,), forward only.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        batch = self.batch(indices)
        with undisturbed(self._model), autocast(self._model, {}), torch.no_grad():
            losses = self.loss(indices)(logits_of(self._model, batch), batch.labels)
        check_finite(losses)
        return losses

    def violation(self, losses: Tensor, indices: Sequence[int]) -> Tensor:
        """r_i = max(0, l_i - tau_i) in nats, (N,), float64."""
        thresholds = self.thresholds[list(indices)].to(losses)
        return (losses - thresholds).clamp(min=0).double()

    def state_dict(self) -> dict[str, Any]:
        """Thresholds and what they are of; for "kl" the aligned model's reply distributions too."""
        aligned = {
            str(i): {"tokens": a.tokens, "log_probs": a.log_probs}
            for i, a in enumerate(self._aligned)
        }
        return {
            "anchors": self._anchors.digest(),
            "reference": self._reference,
            "thresholds": self.thresholds.clone(),
            "aligned": aligned,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise if a state is of other anchors or of another anchor loss.

        Older versions wrote no digest of the anchors; of theirs the number is compared.

        Raises:
            ValueError: says what to build the guard with.
        """
        count, own = len(state["thresholds"]), self._anchors.digest()
        if count != len(self._anchors) or state.get("anchors", own) != own:
            others = "others" if count == len(self._anchors) else f"{len(self._anchors)}"
            raise ValueError(
                f"this guard state was made with {count} anchors, the guard has {others}; build it "
                "from the same anchors file, by the same tokenizer"
            )
        reference = state.get("reference", "kl" if state["aligned"] else "nll")
        if reference != self._reference:
            raise ValueError(
                f'this guard state was made with reference="{reference}", the guard has '
                f'"{self._reference}"; build it with reference="{reference}"'
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `check_state` lets pass."""
        self.thresholds = state["thresholds"].clone()
        self._aligned = [
            ReplyDistribution(a["tokens"], a["log_probs"]) for a in state["aligned"].values()
        ]
