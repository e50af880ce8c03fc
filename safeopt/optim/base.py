"""What every optimizer of this package shares: it is its base optimizer, and may hold a guard."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch.optim import Optimizer

from safeopt.correction import StepGuard
from safeopt.guard import Guard
from safeopt.optim.reference import guarded_step, named_parameters, still_step
from safeopt.optim.storage import NarrowStorage, Precision, restore_moments, widened_step

Closure = Callable[[], Any]
HELD = "held_guard"  # in what pickle and copy take of an optimizer, and in no state_dict

_HOLDERS: WeakKeyDictionary[Guard, ReferenceType[HoldsGuard]] = WeakKeyDictionary()

_EXCLUDED = {
    "capturable": "its small solves are read on the host, which a captured graph cannot replay; "
    "leave capturable=False, or train without a guard",
    "differentiable": "its correction writes to the weights without a gradient; leave "
    "differentiable=False, or train without a guard",
}


def unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """The ``step`` of an optimizer class without the layer that fires step hooks.

    torch wraps ``step`` of every class that it instantiates. An optimizer that steps through
    another class's ``step`` has that layer itself, and the hooks would fire twice.
    """
    inner: Callable[..., Any] = step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
    return inner


def without_guard(state: dict[str, Any]) -> dict[str, Any]:
    """What a pickle or a copy gives its optimizer; warns if the first one held a guard.

    A guard holds the model, which is not copied with an optimizer.
    """
    if state.get(HELD):
        warnings.warn(
            "a copied or unpickled optimizer comes without its guard and steps unguarded: call "
            "optimizer.hold(guard) with a guard of the model whose parameters it steps",
            stacklevel=3,
        )
    return {name: value for name, value in state.items() if name != HELD}


def check_holdable(optimizer: Optimizer, guard: StepGuard) -> None:
    """Raise if ``optimizer`` cannot be guarded.

    Raises:
        ValueError: a parameter is not in the guard's model, or an option that a guard excludes.
    """
    for option, reason in _EXCLUDED.items():
        if any(group.get(option) for group in optimizer.param_groups):
            raise ValueError(f"{option}=True does not go together with a guard: {reason}")
    named_parameters(optimizer, guard)


def _has_other_holder(optimizer: HoldsGuard, guard: Guard) -> bool:
    """True if a live optimizer moves other parameters of the model under the same guard."""
    known = _HOLDERS.get(guard)
    other = None if known is None else known()
    if other is None or other is optimizer or other.guard is not guard:
        return False
    theirs = _moved_by(other) & {id(p) for p in guard.model.parameters()}
    # One that moves the same parameters has taken the other's place, as when a cell is run again.
    return bool(theirs) and theirs.isdisjoint(_moved_by(optimizer))


def _moved_by(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _claim(guard: Guard, optimizer: HoldsGuard) -> None:
    """Make an optimizer the one that holds a guard.

    A guard's subspace spans all that its optimizer moves, and its schedule counts that
    optimizer's steps.

    Raises:
        ValueError: another one holds it.
    """
    if _has_other_holder(optimizer, guard):
        gc.collect()  # a host may keep its optimizer in a cycle, which outlives its use
        if _has_other_holder(optimizer, guard):
            raise ValueError(
                "another optimizer, over other parameters, holds this guard already: give one "
                "optimizer all parameters (in groups, if their options differ), or build one guard "
                "per optimizer"
            )
    _HOLDERS[guard] = ref(optimizer)


class HoldsGuard(Optimizer):
    """Mixin in front of a base optimizer whose step treats parameters one by one.

    Without a guard the base optimizer's ``step`` runs as it is. With one, the base optimizer
    proposes and the guard corrects (`safeopt.optim.reference.guarded_step`).
    """

    guard: StepGuard | None = None  # unpickled and copied optimizers come without one

    _precision = Precision()
    _storage: NarrowStorage | None = None  # during a step of narrow weights

    def hold(self, guard: StepGuard) -> None:
        """Take a guard later, from hosts that shard the model and the optimizer together.

        Raises:
            ValueError: a parameter is not in the guard's model, an option that a guard excludes,
                or another optimizer, over other parameters, that holds the guard.
        """
        self._hold(guard, self._precision)

    def _hold(self, guard: StepGuard | None, precision: Precision | None = None) -> None:
        """Take the guard and what to do with narrow weights; the last line of a constructor.

        Raises:
            ValueError: a parameter is not in the guard's model, an option that a guard excludes,
                or another optimizer, over other parameters, that holds the guard.
        """
        self._precision = precision or self._precision
        self._precision.check(self)
        if guard is None:
            return
        check_holdable(self, guard)
        if isinstance(guard, Guard):  # one of a passport corrects each parameter alone
            _claim(guard, self)
        self.guard = guard
        # A fused base would let GradScaler hand it scaled gradients, and infinite ones, to sort
        # out by itself; a guard has to see the step that is really taken.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Raises:
            ValueError: with a guard, if a parameter is not in its model.
        """
        before = list(self.param_groups)
        super().add_param_group(param_group)
        self._check_groups_added_to(before)

    def _check_groups_added_to(self, before: list[dict[str, Any]]) -> None:
        """Take new groups away again if the guard cannot take them."""
        try:
            self._precision.check(self)
            if self.guard is not None:
                check_holdable(self, self.guard)
        except ValueError:
            self.param_groups[:] = before
            raise

    def step(self, closure: Closure | None = None) -> Any:
        """Take one optimization step.

        Args:
            closure: recomputes the loss and its gradient; called once, before the step.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: with a guard, if a gradient or an anchor loss is not finite.
                Weights and optimizer state are untouched.
        """
        if self.guard is None and self._precision.is_plain:
            return self._base_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad(), self._narrow_weights_open():
            if self.guard is None:
                self._base_step()
            elif self._moves():
                self._guarded_step(self.guard)
            else:
                still_step(self, self.guard, lambda _: self._chunk_step())
        return loss

    @contextmanager
    def _narrow_weights_open(self) -> Iterator[None]:
        if not self._precision.is_plain:
            self._storage = NarrowStorage(self, self._precision)
        try:
            yield
        finally:
            self._storage = None

    def _moves(self) -> bool:
        """False if no learning rate lets a weight move, as in the first step of a warm-up."""
        return any(float(group["lr"]) != 0 for group in self.param_groups)

    def _guarded_step(self, guard: StepGuard) -> None:
        """The guarded step; an optimizer may know a faster way."""
        guarded_step(self, guard, lambda _: self._chunk_step(), storage=self._storage)

    def _chunk_step(self) -> None:
        """The base step on a few parameters; an optimizer may know a faster way for them."""
        self._base_step()

    def _base_step(self, closure: Closure | None = None) -> Any:
        """The step of the base optimizer, on whatever ``param_groups`` holds."""
        step = unhooked(super().step.__func__)  # type: ignore[attr-defined]
        if self._storage is None:
            return step(self, closure)
        widened_step(self, self._storage, self._precision, lambda: step(self))
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; fp32 moments of narrow weights stay fp32.

        torch casts whatever it loads to the dtype of the parameter.
        """
        loaded: list[dict[str, Any]] = []  # as other hooks leave it
        hook = self.register_load_state_dict_pre_hook(lambda _, state: loaded.append(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        if self._precision.moments_dtype is not None:
            restore_moments(self, loaded[0], self._precision.moments_dtype)

    def __getstate__(self) -> dict[str, Any]:
        held = self.guard is not None
        return {**super().__getstate__(), "_precision": self._precision, HELD: held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(without_guard(state))
