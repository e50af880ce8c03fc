"""Guard: anchors, sketch, schedule and budget; keeps a model on its safety level set."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from safeopt.anchors import Anchors, check_fits
from safeopt.calibration import Calibration, Reference
from safeopt.correction import LevelSetCorrection, Momentum
from safeopt.distributed import Ranks, Share, process_group_of
from safeopt.geometry.coverage import (
    Coverage,
    Uncovered,
    device_of,
    find_coverage,
    prepare,
    trainable_names,
    unwrapped,
)
from safeopt.geometry.frame import Frame
from safeopt.geometry.gradient_sketch import GradientSketch
from safeopt.geometry.moves import (
    Eigenbasis,
    Retraction,
    capped_retraction,
    next_brake,
    retraction_weights,
)
from safeopt.isolation import autocast
from safeopt.layouts import refuse_flattened
from safeopt.passport.guard import PassportGuard
from safeopt.sampling import AnchorSampler
from safeopt.schedule import RefreshSchedule
from safeopt.settings import check_settings
from safeopt.state import check_whole


class Guard:
    """Keeps every optimizer step on the anchors' level set.

    An optimizer that holds a guard proposes a step s; the guard makes three moves:

    1. *tangent*, every step: s <- s - G^T V Omega^-1 V^T (G s), with G the anchors' gradients
       and K = G G^T = V Omega V^T, so that no anchor loss changes to first order;
    2. *retraction*, at a refresh: r_i = max(0, l_i - tau_i) is undone by v = -G^T a with
       (K + damping tr(K)/N I) a = r, a >= 0, not longer than
       retraction_cap sqrt(period) max ||s||, with the maximum over the run so far;
    3. *transport*: G is measured afresh every ``refresh_every`` steps, and if the anchors have
       moved by more than ``step_limit`` since the last time, the learning rate is cut until they
       no longer do.

    Build it on the aligned model, before training: tau_i = l_i(theta*) + budget.

    Args:
        model: the aligned model; wrappers of DDP and torch.compile are looked through.
        anchors: 16 to 512 examples whose behaviour must stay.
        budget: how far an anchor's loss may rise above the aligned model's, nats per token.
        refresh_every: p, optimizer steps between two refreshes.
        refresh_within: longest period; a refresh then comes, after p steps or more, when second
            order predicts that the budget will be passed (`safeopt.schedule`).
        anchors_per_refresh: N, anchors looked at in one refresh; drawn in turn from all.
        rank: k, eigenvectors kept; None keeps all above ``eigenvalue_floor``.
        compression_rank: q, singular directions kept per anchor and matrix; None keeps exact
            token factors (more memory).
        eigenvalue_floor: eigenvalues of K below this share of the largest are not removed.
        damping: mu of the retraction.
        retraction_cap: c of the retraction. Its yardstick is the longest step so far, so that a
            schedule that lets the steps fade out does not take the way back along.
        momentum_orthogonal: make the retraction orthogonal to the optimizer's momentum: it then
            costs the task nothing to first order, and cannot hold against a task gradient that
            keeps opposing the anchors.
        step_limit: trust region; a refresh that finds a larger mean violation, in nats, shortens
            the steps until the next one (`safeopt.geometry.moves.next_brake`). Where
            ``safety/brake`` stays low and the task is not learned, refresh sooner, or set None,
            which never does and may let the anchors move far in mid-run.
        tangent: switch of the first move.
        retraction: switch of the second move.
        transport: False keeps a sketch while the same parameters train; losses are measured.
        reference: anchor loss, "nll" of the reply or "kl" from the aligned model on it.
        uncovered: trainable parameters that no rule covers: "error" names them, "ignore" lets
            them train unguarded, "freeze" stops them from training.
        seed: seed of the order in which anchors are drawn.
        process_group: processes that hold the same weights and share the work of a refresh.
            Found by itself under DistributedDataParallel or ``fully_shard``; pass
            ``torch.distributed.group.WORLD`` if the model is wrapped later.

    Raises:
        ValueError: settings out of range, nothing trains, uncovered parameters, token ids or
            lengths that do not fit the model.
        FloatingPointError: an anchor loss is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        anchors: Anchors,
        *,
        budget: float = 0.02,
        refresh_every: int = 5,
        refresh_within: int | None = None,
        anchors_per_refresh: int = 8,
        rank: int | None = None,
        compression_rank: int | None = 8,
        eigenvalue_floor: float = 1e-4,
        damping: float = 0.1,
        retraction_cap: float = 1.0,
        momentum_orthogonal: bool = False,
        step_limit: float | None = 0.05,
        tangent: bool = True,
        retraction: bool = True,
        transport: bool = True,
        reference: Reference = "nll",
        uncovered: Uncovered = "error",
        seed: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_settings(locals())
        self.model = unwrapped(model)
        self._process_group = process_group or process_group_of(model)
        self.anchors = anchors
        self.rank, self.compression_rank = rank, compression_rank
        self.eigenvalue_floor, self.damping = eigenvalue_floor, damping
        self.retraction_cap, self.step_limit = retraction_cap, step_limit
        self.momentum_orthogonal = momentum_orthogonal
        self.tangent, self.retraction, self.transport = tangent, retraction, transport
        check_fits(self.model, anchors)
        self._schedule = RefreshSchedule(refresh_every, refresh_within, budget)
        self._sampler = AnchorSampler(anchors.kinds, anchors_per_refresh, seed)
        self._may_ignore = uncovered == "ignore"
        prepare(self.model, uncovered)
        self._coverage()
        self._calibration = Calibration(
            self.model, anchors, budget, reference, anchors_per_refresh, self.ranks
        )
        self._frame: Frame | None = None
        self.violation = torch.zeros(0)
        self._longest_step, self.brake = 0.0, 1.0
        self._metrics: dict[str, float] = {}

    @staticmethod
    def from_passport(model: nn.Module, path: str | Path, **options: Any) -> PassportGuard:
        """Guard a model without anchors: see `PassportGuard.from_passport` for ``options``."""
        return PassportGuard.from_passport(model, path, **options)

    # -- construction ----------------------------------------------------------------------

    def _coverage(self, names: frozenset[str] | None = None) -> Coverage:
        """The rules for what trains now: adapters and wrappers may have come after the guard."""
        refuse_flattened(self.model)
        coverage = find_coverage(self.model, names)
        if not self._may_ignore:
            coverage.check_complete()
        return coverage

    def recalibrate(self) -> None:
        """Measure tau again unless a refresh has used it: a host has set up mixed precision."""
        if self._frame is None:
            self._calibration.renew()

    # Settings that are spent at construction; the others may be changed while training.

    @property
    def budget(self) -> float:
        """How far an anchor's loss may rise above the aligned model's, nats per token."""
        return self._calibration.budget

    @property
    def refresh_every(self) -> int:
        """p, optimizer steps between two refreshes, at least."""
        return self._schedule.shortest

    @property
    def anchors_per_refresh(self) -> int:
        """N, anchors looked at in one refresh."""
        return self._calibration.at_once

    # -- refresh ---------------------------------------------------------------------------

    def refresh(self, names: frozenset[str] | None = None) -> None:
        """Measure losses and, with transport, the sketch afresh at the present weights.

        Called by the optimizer when due. Leaves ``p.grad``, RNG state, train/eval modes, hooks
        and buffers as they were, also on errors, and the weights alone.

        Args:
            names: trainable parameters that the optimizer moves; all trainable ones by default.

        Raises:
            FloatingPointError: an anchor's loss or gradient is not finite.
            ValueError: a parameter without a rule, or used without its module being called; the
                latter is looked for when other parameters train than at the last refresh.
        """
        start = time.perf_counter()
        names = frozenset(trainable_names(self.model)) if names is None else names
        frame = self._frame
        is_new = frame is None or frame.names != names
        with autocast(self.model, {}):
            if frame is None or is_new or self.transport:
                frame = self._frame = self._measure(names, verify=is_new)
                losses = frame.sketch.losses
            else:
                losses = self.ranks.same(self._calibration.measure(frame.anchors))
        self._record_losses(losses, frame.anchors)
        self._schedule.refreshed(float(self.violation.mean()), is_new=is_new)
        self._metrics["safety/refresh_ms"] = 1e3 * (time.perf_counter() - start)

    def _measure(self, names: frozenset[str], verify: bool) -> Frame:
        indices = self._sampler.draw()

        def sketch(share: Share) -> GradientSketch:
            return GradientSketch.measure(
                self.model,
                self._coverage(names),
                self._calibration.batch(indices).take(share.positions),
                self._calibration.loss([indices[i] for i in share.positions]),
                compression_rank=self.compression_rank,
                verify=verify,
            )

        return Frame.measure(indices, names, sketch, self.ranks, self._parameters, self._kept)

    def _kept(self, gram: Tensor) -> Eigenbasis:
        return Eigenbasis.of(gram, self.rank, self.eigenvalue_floor)

    def _record_losses(self, losses: Tensor, anchors: Sequence[int]) -> None:
        self.violation = self._calibration.violation(losses, anchors)
        self._metrics["safety/anchor_loss"] = float(losses.mean())
        self._metrics["safety/violation"] = float(self.violation.mean())
        if self.step_limit is not None:
            self.brake = next_brake(self.brake, float(self.violation.mean()), self.step_limit)

    @property
    def ranks(self) -> Ranks:
        """The processes that train the model, as it is sharded now."""
        return Ranks.of(self._parameters(), self._process_group)

    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    @property
    def frame(self) -> Frame:
        """What the last refresh measured.

        Raises:
            RuntimeError: there has been none.
        """
        if self._frame is None:
            raise RuntimeError("no sketch yet: call guard.refresh() or take an optimizer step")
        return self._frame

    @property
    def sketch(self) -> GradientSketch | None:
        """The anchors' gradients at the last refresh; None before the first."""
        return None if self._frame is None else self._frame.sketch

    @property
    def thresholds(self) -> Tensor:
        """tau_i = l_i(theta*) + budget, nats per token, one per anchor."""
        return self._calibration.thresholds

    # -- what an optimizer asks during a step ----------------------------------------------

    @property
    def basis_age(self) -> int:
        """Optimizer steps since the last refresh."""
        return self._schedule.age

    def refresh_if_due(self, names: frozenset[str]) -> None:
        """Refresh when due or when other parameters train; raises before anything has changed."""
        if self._is_due or self.frame.names != names:
            self.refresh(names)
        self._frame = self.frame.placed(self._parameters)

    @property
    def _is_due(self) -> bool:
        if self._frame is None or self._schedule.is_due:
            return True
        # A LoRA adapter's first sketch is blind to lora_A, whose gradient is zero at the start.
        return self.transport and self._frame.has_silence and self._schedule.may_look_again

    def correction(self, momentum: Momentum) -> LevelSetCorrection:
        """Begin the tangent and retraction moves of one step."""
        parameters = self._parameters()
        ranks = Ranks.of(parameters, self._process_group)
        return LevelSetCorrection(self, self.frame.blank(ranks, parameters), momentum)

    def tangent_weights(self, coefficients: Tensor) -> Tensor:
        """Return a of the tangent move s - G^T a for c = G s, (N,); zero when switched off."""
        if not self.tangent:
            return torch.zeros_like(coefficients)
        return self.frame.eigenbasis.tangent_weights(coefficients)

    def _wants_retraction(self) -> bool:
        """True right after a refresh that found an anchor over its budget."""
        return self.retraction and self.basis_age == 0 and bool((self.violation > 0).any())

    def wants_momentum(self) -> bool:
        """True if this step's retraction is to be orthogonal to the optimizer's momentum m."""
        return self.momentum_orthogonal and self._wants_retraction()

    def retraction_for(
        self, step_norm: float, momentum_coefficients: Tensor, momentum_norm: float
    ) -> Retraction:
        """Return the retraction that undoes the violation found at the last refresh, if any.

        Args:
            step_norm: ||s|| after the tangent move.
            momentum_coefficients: G m, (N,).
            momentum_norm: ||m||; 0 when the retraction need not be orthogonal to it.
        """
        if not self._wants_retraction():
            return Retraction(torch.zeros_like(momentum_coefficients), 0.0, 0.0)
        gram = self.frame.gram
        weights = retraction_weights(gram, self.violation, self.damping)
        self._longest_step = max(self._longest_step, step_norm)
        cap = self.retraction_cap * math.sqrt(self._schedule.period) * self._longest_step
        cap = cap if step_norm > 0 else 0.0  # a step of length zero leaves the weights alone
        return capped_retraction(gram, weights, momentum_coefficients, momentum_norm, cap)

    def record_step(self, step_norm: float, metrics: dict[str, float]) -> None:
        """Count a finished optimizer step of length ||s|| and keep its figures."""
        self._schedule.advance(step_norm)
        self._longest_step = max(self._longest_step, step_norm)
        self._metrics |= metrics

    # -- telemetry and state ---------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Figures of the last step and the last refresh.

        ``safety/anchor_loss`` and ``safety/violation`` (nats, means over the last refresh's
        anchors), ``safety/removed_fraction`` (||G^T a|| / ||s|| of the tangent move),
        ``safety/retraction_ratio`` (||v|| / ||s||), ``safety/leak`` (||U^T d|| / ||d|| of the
        stored weights, measured after a refresh; to 5e-4 where torch rounds what it multiplies to
        bf16, after ``torch.set_float32_matmul_precision("medium")``), ``safety/rank`` (k),
        ``safety/captured_energy`` (share of the gradient energy that compression kept, mean),
        ``safety/sketch_mb``, ``safety/basis_age`` (steps), ``safety/refreshes`` (their number),
        ``safety/brake`` (factor on the learning rate), ``safety/refresh_ms`` and
        ``safety/step_ms`` (milliseconds of the last refresh and of the last step beyond the base
        optimizer; kernels do both at once and count whole).
        """
        metrics = self._metrics | self._schedule.metrics() | {"safety/brake": self.brake}
        if (frame := self._frame) is not None:
            metrics["safety/rank"] = float(len(frame.eigenbasis.values))
            metrics["safety/captured_energy"] = float(frame.sketch.captured_energy.mean())
            metrics["safety/sketch_mb"] = frame.sketch.nbytes / 2**20
        return metrics

    def spectrum(self) -> Tensor:
        """Eigenvalues of the last sketch's empirical Fisher, largest first, (N,)."""
        return self.frame.spectrum()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact resume needs: thresholds, schedule, sketch.

        It is the same on every process. With sharded parameters it is a collective: call it on
        all of them.
        """
        frame = self._frame
        # A tuple is one leaf to torch.distributed.checkpoint, which otherwise loads tensors
        # into those that are there already; before the first refresh there are none.
        whole = frame and frame.state_dict(self.ranks, self._parameters())
        return self._state_without_frame() | {"frame": (whole,)}

    def _state_without_frame(self) -> dict[str, Any]:
        return {
            "calibration": self._calibration.state_dict(),
            "schedule": self._schedule.state_dict(),
            "longest_step": self._longest_step,
            "brake": self.brake,
            "sampler": self._sampler.state_dict(),
            "violation": (self.violation,),
            "metrics": (dict(self._metrics),),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; anchors and reference must be the same.

        Raises:
            ValueError: the state lacks something, or is of other anchors, of another reference
                or of a passport's guard. Nothing has been taken over.
        """
        check_whole(state, self._state_without_frame() | {"frame": ()})
        self._calibration.check_state(state["calibration"])
        device, (violation,), (frame,) = device_of(self.model), state["violation"], state["frame"]
        self._frame = frame and Frame.from_state_dict(frame, self._kept, device)
        self._calibration.load_state_dict(state["calibration"])
        self._sampler.load_state_dict(state["sampler"])
        self._schedule.load_state_dict(state["schedule"])
        self._longest_step, self.brake = state["longest_step"], state["brake"]
        self.violation = violation.to(device)
        self._metrics = dict(state["metrics"][0])
