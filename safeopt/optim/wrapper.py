"""guarded: any optimizer of torch, or with torch's interface, under a guard."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from safeopt.correction import StepGuard
from safeopt.isolation import autocast, autocasts
from safeopt.optim.base import HELD, Closure, HoldsGuard, unhooked, without_guard
from safeopt.optim.reference import all_at_once, check_gradients, guarded_step, named_parameters
from safeopt.optim.storage import Precision

# Optimizers known to treat parameters one by one, and to stand still when their learning rate is
# zero. Exactly these: a subclass may do anything.
_SEPARABLE: frozenset[type[Optimizer]] = frozenset(
    {
        torch.optim.Adadelta,
        torch.optim.Adafactor,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.Adamax,
        torch.optim.AdamW,
        torch.optim.ASGD,
        torch.optim.Muon,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.SGD,
    }
)


class GuardedOptimizer(HoldsGuard):
    """An optimizer whose parameter displacement a guard corrects; made by `guarded`.

    Parameter groups, state, checkpoints, hooks and every other attribute are those of the
    optimizer inside; only ``step`` is this one's.
    """

    def __init__(self, optimizer: Optimizer, guard: StepGuard) -> None:
        self.optimizer = optimizer
        self._patch_step_function()
        self._hold(guard)

    def _hold(self, guard: StepGuard | None, precision: Precision | None = None) -> None:
        kind = type(self.optimizer)
        if getattr(guard, "momentum_orthogonal", False) and kind not in _SEPARABLE:
            raise ValueError(
                f"momentum_orthogonal=True needs the momentum of {kind.__name__}, and where it "
                "keeps that is not known; build the guard with momentum_orthogonal=False"
            )
        super()._hold(guard, precision)

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # while unpickling, before there is one
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, HELD: self.guard is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(without_guard(state))
        self._patch_step_function()

    def __repr__(self) -> str:
        return f"guarded {self.optimizer!r}"

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer inside."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the optimizer inside."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the optimizer inside."""
        return self.optimizer.defaults

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer inside; the guard has its own."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the optimizer inside."""
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the optimizer inside.

        Raises:
            ValueError: a parameter is not in the guard's model.
        """
        before = list(self.param_groups)
        self.optimizer.add_param_group(param_group)
        self._check_groups_added_to(before)

    def step(self, closure: Closure | None = None) -> Any:
        """Take one guarded step; see `safeopt.SafeAdamW.step`.

        An optimizer that treats parameters one by one calls the closure once. Any other is handed
        the closure. If that raises, or leaves a gradient that is not finite, the weights are put
        back; tensors of the optimizer's state that it has changed in place by then (the history of
        LBFGS) are not.
        """
        if self.guard is None or type(self.optimizer) in _SEPARABLE:
            return super().step(closure)
        with torch.no_grad():
            return self._step_at_once(self.guard, closure)

    def _step_at_once(self, guard: StepGuard, closure: Closure | None) -> Any:
        parameters = named_parameters(self, guard)
        casts, results = autocasts(guard.model), []

        def checked() -> Any:
            assert closure is not None
            with torch.enable_grad(), autocast(guard.model, casts):
                loss = closure()
            check_gradients(parameters)
            return loss

        def base_step(optimizer: Optimizer) -> None:
            results.append(self._base_step(None if closure is None else checked))

        guarded_step(self, guard, base_step, all_at_once, has_gradients=closure is None)
        return results[0]

    def _moves(self) -> bool:
        return type(self.optimizer) not in _SEPARABLE or super()._moves()

    def _base_step(self, closure: Closure | None = None) -> Any:
        step = unhooked(type(self.optimizer).step)
        return step(self.optimizer) if closure is None else step(self.optimizer, closure)


def guarded(optimizer: Optimizer, guard: StepGuard) -> GuardedOptimizer:
    """Put any optimizer under a guard, by the displacement that its step leaves in the weights.

    Optimizers of `torch.optim` that treat parameters one by one are stepped a few parameters at a
    time. Any other, from whatever package, is stepped whole, which takes a copy of the weights.
    What it returns stands in for ``optimizer``: schedulers, checkpoints and hooks work on it.

    Args:
        optimizer: an optimizer over parameters of the guard's model; do not step it yourself
            from here on.
        guard: a guard built on that model.

    Raises:
        ValueError: the optimizer holds a guard already, a parameter is not in the guard's model,
            or an option that a guard excludes.

    Example:
        >>> inner = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=2e-5)
        >>> optimizer = safeopt.guarded(inner, guard)
    """
    if isinstance(optimizer, HoldsGuard):
        raise ValueError(
            f"{type(optimizer).__name__} holds a guard by itself: pass guard=... to its constructor"
        )
    return GuardedOptimizer(optimizer, guard)
