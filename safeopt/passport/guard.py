"""PassportGuard: a guard without anchors, held to a subspace that was measured beforehand."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from safeopt.correction import Momentum
from safeopt.distributed import is_dtensor
from safeopt.geometry.adapters import bind, clear_adapters
from safeopt.geometry.blocks import squared_norm
from safeopt.geometry.coverage import Uncovered, device_of, freeze, prepare, unwrapped
from safeopt.geometry.subspace import Pieces, removed_by
from safeopt.passport.file import Passport, PassportError
from safeopt.settings import check_settings

_SHOWN = 3  # differences named in full


class PassportGuard:
    """Takes out of every step what the anchors of a passport would notice.

    s <- s - P s for each parameter alone, at every step: no anchors, no refresh, no state and no
    communication between ranks, which must hold whole parameters.

    A LoRA adapter around the model is held by the input side of its matrix: what the anchors feed
    in is taken out of a fresh ``lora_A`` at once, which leaves the model's function alone.

    Args:
        model: the model that trains, or a PEFT model around it; wrappers of DDP and torch.compile
            are looked through.
        pieces: projectors by the base model's parameter names, on the model's device.
        uncovered: trainable parameters that the pieces say nothing about: "error" names them,
            "ignore" lets them train unguarded, "freeze" stops them from training.
        digest: digest of the passport, for checkpoints.

    Raises:
        ValueError: parameters that are not covered, an unknown ``uncovered``, or an adapter that
            has trained already.
    """

    brake = 1.0

    def __init__(
        self,
        model: nn.Module,
        pieces: Pieces,
        *,
        uncovered: Uncovered = "error",
        digest: str = "",
    ) -> None:
        check_settings({"uncovered": uncovered})
        self.model = unwrapped(model)
        prepare(self.model)
        bound = bind(self.model, pieces)
        if bound.unknown and uncovered == "error":
            raise ValueError(
                f"the passport says nothing about the trainable parameters {list(bound.unknown)}; "
                "pass uncovered='freeze' to stop them from training or uncovered='ignore' to "
                "train them unguarded"
            )
        clear_adapters(self.model, bound)
        if uncovered == "freeze":
            freeze(self.model, bound.unknown)
        self.pieces = bound.pieces
        self._digest = digest
        self._metrics: dict[str, float] = {}

    @classmethod
    def from_passport(
        cls,
        model: nn.Module,
        path: str | Path,
        *,
        tokenizer: Any = None,
        check_weights: bool = True,
        uncovered: Uncovered = "error",
    ) -> PassportGuard:
        """Read a passport, check it against the model, and guard the model with it.

        Args:
            model: the model that the passport was measured on, before training, or a PEFT model
                around it.
            path: the passport's file.
            tokenizer: a tokenizer to be checked too.
            check_weights: False accepts other weights of the same shapes, as when a run is
                resumed from a checkpoint.
            uncovered: see the class.

        Raises:
            PassportError: the file is no whole, unchanged passport, or is of another model or
                tokenizer; the message names what differs.
        """
        passport = Passport.load(path)
        inner = unwrapped(model)
        differing = passport.differences(inner, tokenizer)
        if not check_weights:
            differing = [d for d in differing if not d.startswith("other weights")]
        if differing:
            raise PassportError(_explain(passport, differing))
        pieces = passport.subspace.to(device_of(inner)).pieces()
        return cls(inner, pieces, uncovered=uncovered, digest=passport.digest)

    def refresh_if_due(self, names: frozenset[str]) -> None:
        """Nothing is ever due.

        Raises:
            ValueError: the parameters are sharded.
        """
        del names
        if any(is_dtensor(p) for p in self.model.parameters()):
            raise ValueError(
                "a passport does not guard sharded parameters (fully_shard) yet: train with DDP, "
                "or build a Guard from anchors, which does"
            )

    def correction(self, momentum: Momentum) -> PieceCorrection:
        """Begin the correction of one step; the momentum is not used."""
        del momentum
        return PieceCorrection(self.pieces, self._metrics)

    def metrics(self) -> dict[str, float]:
        """Figures of the last step.

        ``safety/removed_fraction`` (||P s|| / ||s||) and ``safety/step_ms`` (milliseconds
        beyond the base optimizer).
        """
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """The passport's digest: there is nothing else to resume."""
        return {"passport": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the checkpoint was made under this passport.

        Raises:
            ValueError: it was made under another one, or under none.
        """
        if "passport" not in state:
            raise ValueError(
                "this is no state of a guard from a passport; if a Guard with anchors made it, "
                "build one from the same anchors"
            )
        if state["passport"] != self._digest:
            raise ValueError(
                f"this checkpoint was made under the passport {state['passport']}, the guard "
                f"holds {self._digest}; load the same passport file"
            )


def _explain(passport: Passport, differing: list[str]) -> str:
    shown = "; ".join(differing[:_SHOWN])
    more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    return (
        f"the passport was measured on {passport.header['model']['name'] or 'another model'}, "
        f"which differs from this one: {shown}{more}. Load the model it was made for; to resume a "
        "run whose weights have moved already, pass check_weights=False"
    )


class PieceCorrection:
    """s <- s - P s, parameter by parameter, as soon as each has moved.

    Args:
        pieces: projectors by parameter name.
        metrics: where the step's figures are written.
    """

    def __init__(self, pieces: Pieces, metrics: dict[str, float]) -> None:
        self._pieces, self._metrics = pieces, metrics
        self._squared_norm = self._removed = 0.0
        self._seconds = 0.0

    def observe(self, name: str, parameter: Tensor, displacement: Tensor) -> None:
        """Write p <- p - P s."""
        start = time.perf_counter()
        self._squared_norm += squared_norm(displacement)
        if name in self._pieces:
            removed = removed_by(self._pieces[name], displacement)
            self._removed += squared_norm(removed)
            parameter -= removed
        self._seconds += time.perf_counter() - start

    def finish(self, parameters: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the step's figures; everything has been written."""
        del parameters
        share = (self._removed / self._squared_norm) ** 0.5 if self._squared_norm else 0.0
        self._metrics |= {
            "safety/removed_fraction": share,
            "safety/step_ms": 1e3 * self._seconds,
        }
        return dict(self._metrics)
