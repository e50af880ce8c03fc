"""SafeAdamW: torch.optim.AdamW that can hold a guard."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from safeopt.correction import StepGuard
from safeopt.optim.reference import guarded_step, named_parameters

# torch wraps ``step`` of every class it instantiates so that step hooks fire; calling the wrapped
# one from a subclass, whose own ``step`` is wrapped too, would fire them twice.
_adamw_step: Callable[..., Any] = inspect.unwrap(torch.optim.AdamW.step)


def _guarded_adamw_step(optimizer: torch.optim.Optimizer) -> None:
    """AdamW on the groups of a guarded step: fused, unless an implementation was asked for."""
    for group in optimizer.param_groups:
        if group["foreach"] is None and group["fused"] is None:
            group["fused"] = True
    _adamw_step(optimizer)


class SafeAdamW(torch.optim.AdamW):
    r"""AdamW whose every step stays on the guard's safety level set.

    AdamW proposes s, learning rate and decoupled weight decay included; the guard takes out what
    would move the anchor losses to first order and, at a refresh, adds the retraction v:

    .. math::
        \theta \leftarrow \theta + s - G^\top V \Omega^{-1} V^\top G s + v

    See `safeopt.Guard` for the symbols. The projection acts on the step and not on the gradient:
    a projected gradient leaks back through AdamW's preconditioner.

    The constructor is that of `torch.optim.AdamW` with ``guard`` added; optimizer state and
    checkpoints are AdamW's, the guard's state is its own. With ``guard=None`` this is
    `torch.optim.AdamW` bit for bit.

    Args:
        params: parameters, named parameters or groups, as for AdamW.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay; the guard sees it as part of the step.
        amsgrad: use the AMSGrad variant.
        maximize: ascend instead of descend.
        foreach: as in AdamW; with a guard and neither flag given, the step is fused.
        capturable: as in AdamW; not together with a guard.
        differentiable: as in AdamW; not together with a guard.
        fused: as in AdamW.
        guard: a guard built on the model whose parameters these are.

    Raises:
        ValueError: a parameter is not in the guard's model, or an option that a guard excludes.

    Example:
        >>> guard = safeopt.Guard(model, anchors, budget=0.02)
        >>> optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=2e-5, guard=guard)
    """

    guard: StepGuard | None = None  # unpickled and copied optimizers come without one

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        guard: StepGuard | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self.guard = guard
        if guard is not None:
            if capturable or differentiable:
                raise ValueError("a guard does not work with capturable or differentiable yet")
            named_parameters(self, guard)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimization step.

        Args:
            closure: recomputes the loss and its gradient; called once, before the step.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: with a guard, if a gradient or an anchor loss is not finite.
                Weights and optimizer state are untouched.
        """
        if self.guard is None:
            with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
                return _adamw_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            guarded_step(self, self.guard, _guarded_adamw_step)
        return loss
