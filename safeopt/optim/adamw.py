"""SafeAdamW: torch.optim.AdamW that can hold a guard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from safeopt.correction import StepGuard
from safeopt.optim.base import HoldsGuard
from safeopt.optim.listed import listed_step, takes_lists
from safeopt.optim.storage import Precision
from safeopt_kernels.settings import Rounding


class SafeAdamW(HoldsGuard, torch.optim.AdamW):
    r"""AdamW whose every step stays on the guard's safety level set.

    AdamW proposes s, learning rate and decoupled weight decay included; the guard takes out what
    would move the anchor losses to first order and, at a refresh, adds the retraction v:

    .. math::
        \theta \leftarrow \theta + s - G^\top V \Omega^{-1} V^\top G s + v

    See `safeopt.Guard` for the symbols. The projection acts on the step and not on the gradient:
    a projected gradient leaks back through AdamW's preconditioner.

    The constructor is that of `torch.optim.AdamW` with ``guard`` added; optimizer state and
    checkpoints are AdamW's, the guard's state is its own. With ``guard=None`` this is
    `torch.optim.AdamW` bit for bit, unless ``rounding`` or ``moments_dtype`` ask for more.

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
        rounding: how bf16 and fp16 weights are stored. "nearest" is AdamW's; steps much smaller
            than a weight are then lost, and part of what the guard takes out with them.
            "stochastic" (bf16) rounds up or down by chance with the right mean; "kahan" keeps
            what was lost in one more tensor, ``state["compensation"]``, for the next step.
            ``benchmarks/overhead/README.md`` has the leak of each.
        moments_dtype: torch.float32 keeps the moments of bf16 and fp16 weights in fp32, also
            through ``load_state_dict``; None in the dtype of the weights, as AdamW does.
        seed: of stochastic rounding: the random bits depend on it, on the step and on the place
            of the parameter, and so a resumed run repeats them.
        guard: a guard built on the model whose parameters these are.

    Raises:
        ValueError: a parameter is not in the guard's model, or an option that a guard excludes.

    On GPUs the guarded step runs in Triton kernels, where Triton is installed. On CPUs with AVX2,
    AVX-512 or AMX tiles, fp32 weights from a million on are stepped in C++ that is compiled at the
    first such step (a few seconds, once; it takes a C++ compiler), with products in bf16, faster,
    after ``torch.set_float32_matmul_precision("medium")``. ``SAFEOPT_KERNELS=reference`` keeps the
    step in plain torch; ``triton`` and ``native`` (that C++) make a step raise a RuntimeError that
    they cannot take.

    Example:
        >>> guard = safeopt.Guard(model, anchors, budget=0.02)
        >>> optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=2e-5, guard=guard)
    """

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
        rounding: Rounding = "nearest",
        moments_dtype: torch.dtype | None = None,
        seed: int = 0,
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
        self._hold(guard, Precision(rounding, moments_dtype, seed))

    def _guarded_step(self, guard: StepGuard) -> None:
        if takes_lists(self, guard, self._precision):
            listed_step(self, guard, self._precision)
        else:
            super()._guarded_step(guard)

    def _chunk_step(self) -> None:
        prefer_fused(self, self.param_groups)
        self._base_step()


def prefer_fused(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Let AdamW's fused kernel step groups for which the user chose no implementation.

    It reads the step counter on the parameter's device; a state that was saved without it has the
    counter on the CPU.
    """
    devices = _get_fused_kernels_supported_devices()
    for group in groups:
        if group["foreach"] is None and group["fused"] is None:
            steps = {p: optimizer.state.get(p, {}).get("step", p) for p in group["params"]}
            group["fused"] = all(
                p.device.type in devices and step.device == p.device for p, step in steps.items()
            )
