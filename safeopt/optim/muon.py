"""SafeMuon: Muon on hidden matrices, AdamW on everything else, under one guard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from safeopt.correction import StepGuard
from safeopt.optim.adamw import prefer_fused
from safeopt.optim.base import Closure, HoldsGuard, unhooked


class SafeMuon(HoldsGuard):
    r"""Muon on matrices, AdamW on the rest; the guard sees both as one step.

    Matrices move by `torch.optim.Muon`: with momentum B and the Newton-Schulz iteration NS,

    .. math::
        \theta \leftarrow (1 - \gamma \lambda)\,\theta - \gamma' \,\mathrm{NS}(B)

    Muon is made for hidden layers. Embeddings and output heads are matrices too: give them to
    AdamW with a group that says ``use_muon=False``, or let `muon_groups` sort the model. In
    groups that do not say, two-dimensional parameters go to Muon and others to AdamW.

    Without a guard, groups are stepped by `torch.optim.Muon` and `torch.optim.AdamW` themselves,
    and ``state`` holds their keys.

    Args:
        params: parameters, named parameters or groups; a group may set ``use_muon`` and any
            option of the optimizer that it goes to.
        lr: learning rate of the matrices.
        weight_decay: decoupled weight decay of the matrices.
        momentum: factor of Muon's momentum.
        nesterov: use Nesterov momentum in Muon.
        ns_coefficients: coefficients of the Newton-Schulz polynomial.
        eps: numerical floor of the Newton-Schulz iteration.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: how ``lr`` follows a matrix's shape; "match_rms_adamw" makes learning rates
            that suit AdamW suit Muon.
        adamw_lr: learning rate of the rest; that of the matrices by default.
        adamw_betas: AdamW's decay rates.
        adamw_eps: AdamW's epsilon.
        adamw_weight_decay: AdamW's decoupled weight decay.
        guard: a guard built on the model whose parameters these are.

    Raises:
        ValueError: an option out of range, a group with ``use_muon=True`` that holds a parameter
            which is no matrix, or a parameter that is not in the guard's model.

    Source:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        guard: StepGuard | None = None,
    ) -> None:
        # The two constructors check the options and know their own groups' keys.
        muon = torch.optim.Muon(
            [torch.zeros(1, 1)],
            lr,
            weight_decay,
            momentum,
            nesterov,
            ns_coefficients,
            eps,
            ns_steps,
            adjust_lr_fn,
        )
        adamw = torch.optim.AdamW(
            [torch.zeros(1)],
            lr if adamw_lr is None else adamw_lr,
            adamw_betas,
            adamw_eps,
            adamw_weight_decay,
        )
        self._options = {True: muon.defaults, False: adamw.defaults}
        super().__init__(params, {"lr": lr})
        self._hold(guard)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one that does not say ``use_muon`` is split by the parameters' shape.

        Raises:
            ValueError: ``use_muon=True`` on a parameter that is no matrix; with a guard, a
                parameter that is not in its model.
        """
        before = list(self.param_groups)
        for group in _by_optimizer(param_group):
            super().add_param_group({**self._options[group["use_muon"]], **group})
        self._check_groups_added_to(before)

    def _chunk_step(self) -> None:
        prefer_fused(self, [group for group in self.param_groups if not group["use_muon"]])
        self._base_step()

    def _base_step(self, closure: Closure | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kind, use_muon in ((torch.optim.Muon, True), (torch.optim.AdamW, False)):
            groups = [group for group in self.param_groups if group["use_muon"] is use_muon]
            if groups:
                _step_as(kind, self, groups)
        return loss


def muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Named groups of a language model: hidden matrices to Muon, all else to AdamW.

    Embeddings, an output head (whatever ``get_output_embeddings`` returns), norms and biases go
    to AdamW. Adapter matrices of LoRA are hidden matrices.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    find_head = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    tables |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [(name, p) for name, p in trained if p.ndim == 2 and id(p) not in tables]
    rest = [(name, p) for name, p in trained if p.ndim != 2 or id(p) in tables]
    groups = [{"params": hidden, "use_muon": True}, {"params": rest, "use_muon": False}]
    return [group for group in groups if group["params"]]


def _by_optimizer(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group as one for Muon and one for AdamW; those that are not empty."""
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    is_matrix = [_tensor(p).ndim == 2 for p in params]
    if group.get("use_muon") and not all(is_matrix):
        raise ValueError(
            f"parameter {is_matrix.index(False)} of a group with use_muon=True is no matrix, and "
            "Muon handles nothing else; put it into a group with use_muon=False"
        )
    if "use_muon" in group:
        return [{**group, "params": params, "use_muon": bool(group["use_muon"])}]
    parts = {
        flag: [p for p, m in zip(params, is_matrix, strict=True) if m is flag]
        for flag in (True, False)
    }
    return [{**group, "params": part, "use_muon": flag} for flag, part in parts.items() if part]


def _tensor(parameter: Any) -> Tensor:
    """The parameter of a (name, parameter) pair, or the parameter."""
    tensor: Tensor = parameter[1] if isinstance(parameter, tuple) else parameter
    return tensor


def _step_as(kind: type[Optimizer], owner: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Let an optimizer of class ``kind`` step ``groups`` on the owner's state."""
    lent = kind.__new__(kind)
    lent.__setstate__({"state": owner.state, "param_groups": groups, "defaults": dict(groups[0])})
    unhooked(kind.step)(lent)
