"""SafeSGD: torch.optim.SGD that can hold a guard."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from safeopt.correction import StepGuard
from safeopt.optim.base import HoldsGuard


class SafeSGD(HoldsGuard, torch.optim.SGD):
    r"""SGD, with momentum and Nesterov's variant, whose steps stay on the safety level set.

    SGD proposes s, momentum, learning rate and weight decay included; the rest is as in
    `safeopt.SafeAdamW`. With ``guard=None`` this is `torch.optim.SGD` bit for bit.

    Args:
        params: parameters, named parameters or groups, as for SGD.
        lr: learning rate.
        momentum: factor of the momentum.
        dampening: dampening of the momentum.
        weight_decay: L2 penalty; it enters the gradient, and the guard sees it in the step.
        nesterov: use Nesterov momentum.
        maximize: ascend instead of descend.
        foreach: as in SGD.
        differentiable: as in SGD; not together with a guard.
        fused: as in SGD.
        guard: a guard built on the model whose parameters these are.

    Raises:
        ValueError: a parameter is not in the guard's model, or an option that a guard excludes.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        guard: StepGuard | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._hold(guard)
