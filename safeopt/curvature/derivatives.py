"""Derivatives of a model's outputs along a direction: exact, and by finite differences.

Operators are written against the three products of `Derivatives` and know nothing of how they are
made. The pullback is the same for both: one ordinary backward pass, which works with any attention
kernel, activation checkpointing, DDP and FSDP2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from safeopt.curvature.vectors import (
    Outputs,
    Vector,
    displace,
    norm,
    restored,
    trainable_parameters,
)
from safeopt.geometry.coverage import unwrapped
from safeopt.isolation import own_gradients, undisturbed

Check = Literal["always", "first", "never"]
Inner = Callable[[Tensor, Tensor], Tensor]  # outputs z and their change J v to B J v

Evaluate = Callable[[], dict[str, Tensor]]
Finish = Callable[[dict[str, Tensor]], dict[str, Tensor]]

_TRIALS = 6  # steps tried in each direction
_FULL_PRECISION = (torch.float32, torch.float64)


class Derivatives(Protocol):
    """The products that operators are made of."""

    @property
    def parameters(self) -> Vector:
        """What is differentiated, by name."""

    def hessian_product(self, loss: Outputs, v: Vector) -> dict[str, Tensor]:
        """H v for a scalar loss."""

    def output_product(self, outputs: Outputs, inner: Inner, v: Vector) -> dict[str, Tensor]:
        """J^T B(z, J v) for outputs z with Jacobian J."""


def _refuse_stepping_hooks(model: nn.Module) -> None:
    for p in model.parameters():
        if p.requires_grad and getattr(p, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                "a parameter has a post-accumulate-grad hook, as optimizers that step inside "
                "backward register: curvature would make it step; remove the hook first"
            )


@contextmanager
def _evaluating(model: nn.Module, eval_mode: bool) -> Iterator[None]:
    """`undisturbed`, with the modes kept if asked; all evaluations draw the same random numbers."""
    modes = [(m, m.training) for m in model.modules()]
    with undisturbed(model, reentrant=True):
        for module, training in modes:
            module.training = training and not eval_mode
        yield


def pullback(
    model: nn.Module,
    parameters: Vector,
    outputs: Outputs,
    weights: Tensor | None = None,
    *,
    eval_mode: bool = True,
) -> dict[str, Tensor]:
    """J^T u by one ordinary backward pass; ``p.grad`` and the model's state stay as they were.

    Args:
        model: the model, in whatever wrapper its backward pass needs.
        parameters: what is differentiated.
        outputs: evaluates the model.
        weights: u; None for the gradient of a scalar.
        eval_mode: False keeps train and eval modes as they are.
    """
    _refuse_stepping_hooks(model)
    with own_gradients(model):
        with _evaluating(model, eval_mode), torch.enable_grad():
            outputs(model).backward(weights)
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach()
            for name, p in parameters.items()
        }


class Exact:
    """Exact products by ``torch.func``: forward mode over reverse mode.

    Attention runs in PyTorch's plain implementation meanwhile, since the fast kernels have no
    forward-mode derivative.

    Args:
        model: the model, used in eval mode; wrappers are looked through.
        names: the parameters that are differentiated; all trainable ones by default.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        self._model = unwrapped(model)
        self.parameters: Vector = trainable_parameters(model, names)

    def hessian_product(self, loss: Outputs, v: Vector) -> dict[str, Tensor]:
        """H v = d/dh grad L(theta + h v), by ``jvp(grad)``.

        Where an operation has no forward-mode derivative, by the gradient of <grad L, v>.
        """
        point, along = self._point(v)
        gradient = grad(self._function(loss))

        def slope(parameters: dict[str, Tensor]) -> Tensor:
            found = gradient(parameters)
            return torch.stack([(found[name] * along[name]).sum() for name in found]).sum()

        with self._differentiable():
            try:
                product: dict[str, Tensor] = jvp(gradient, (point,), (along,))[1]
            except (NotImplementedError, RuntimeError):
                product = grad(slope)(point)
        return {name: h.detach() for name, h in product.items()}

    def output_product(self, outputs: Outputs, inner: Inner, v: Vector) -> dict[str, Tensor]:
        """J^T B J v, by ``jvp`` and one ordinary backward pass."""
        point, along = self._point(v)
        with self._differentiable():
            value, change, *_ = jvp(self._function(outputs), (point,), (along,))
        weights = inner(value.detach(), change.detach())
        return pullback(self._model, self.parameters, outputs, weights)

    def _point(self, v: Vector) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        point = {name: p.detach() for name, p in self.parameters.items()}
        return point, {name: v[name].to(p.dtype) for name, p in point.items()}

    def _function(self, outputs: Outputs) -> Callable[[dict[str, Tensor]], Tensor]:
        holder = _Evaluation(self._model, outputs)

        def run(parameters: dict[str, Tensor]) -> Tensor:
            values = {f"model.{name}": p for name, p in parameters.items()}
            result: Tensor = functional_call(holder, values, ())
            return result

        return run

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        try:
            with undisturbed(self._model), sdpa_kernel(SDPBackend.MATH):
                yield
        except (NotImplementedError, RuntimeError) as error:
            raise RuntimeError(
                f"the exact product failed ({str(error).splitlines()[0]}); if an attention kernel "
                'has no second derivative, load the model with attn_implementation="eager"; for '
                "layers with a backward pass of their own and for sharded parameters pass "
                'method="finite_difference"'
            ) from error


class _Evaluation(nn.Module):
    """The model and what is asked of it, as one module that ``functional_call`` can swap."""

    def __init__(self, model: nn.Module, outputs: Outputs) -> None:
        super().__init__()
        self.model, self._outputs = model, outputs

    def forward(self) -> Tensor:
        return self._outputs(self.model)


class FiniteDifference:
    """Central differences along v, with a step that is checked against half of it.

    (f(theta + h v) - f(theta - h v)) / 2h with h = step (1 + ||theta||) / ||v||. The error is
    a h^2 from the third derivative and b / h from rounding. With D(h) the product, the distance
    ||D(h) - D(h/2)|| is 3/4 a h^2 where the first rules and above b / h where the second does, so
    4/3 of it is about the error of D(h) and twice it bounds it. Rounding is a matter of chance: a
    product of few dimensions, as an empirical Fisher's of N examples, passes the bound by a little
    now and then. While it exceeds ``tolerance`` times the product, shorter steps are tried, and
    then longer ones, as long as they help.

    Args:
        model: the model, in whatever wrapper its forward and backward passes need.
        names: the parameters that are differentiated, float32 or float64; all trainable ones by
            default.
        step: length of the first step, relative to the weights; by default the cube root of the
            machine precision.
        tolerance: relative error that is small enough.
        check: "always" compares every product with half the step (twice the cost), "first" settles
            the step on the first product, "never" trusts ``step``.
        eval_mode: evaluate in eval mode. False keeps the modes, so that transformers' activation
            checkpointing, which is for training mode, is used; dropout then falls on the same
            units in every evaluation.

    Attributes:
        parameters: what is differentiated, by name.
        error: predicted bound of the last checked product's relative error.

    Raises:
        ValueError: a parameter in half precision, where a small step changes few weights.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str] | None = None,
        *,
        step: float | None = None,
        tolerance: float = 0.01,
        check: Check = "always",
        eval_mode: bool = True,
    ) -> None:
        parameters = trainable_parameters(model, names)
        low = [n for n, p in parameters.items() if p.dtype not in _FULL_PRECISION]
        if low:
            raise ValueError(
                f"finite differences need float32 weights, {low[0]!r} is "
                f"{parameters[low[0]].dtype}: a small step would move few of them; use "
                "model.float() (the forward pass may still run under autocast)"
            )
        precision = max(torch.finfo(p.dtype).eps for p in parameters.values())
        self._model, self._eval_mode = model, eval_mode
        self.parameters: Vector = parameters
        self._step = math.pow(precision, 1 / 3) if step is None else step
        self._tolerance, self._check = tolerance, check
        self.error = math.nan

    def hessian_product(self, loss: Outputs, v: Vector) -> dict[str, Tensor]:
        """H v from two gradients, four when checked."""

        def gradient() -> dict[str, Tensor]:
            return self._pullback(loss)

        return self._difference(gradient, lambda change: change, v)

    def output_product(self, outputs: Outputs, inner: Inner, v: Vector) -> dict[str, Tensor]:
        """J^T B J v from three forward passes and a gradient, five and two when checked."""
        value = self._evaluate(outputs)

        def finish(change: dict[str, Tensor]) -> dict[str, Tensor]:
            return self._pullback(outputs, inner(value, change[""]))

        return self._difference(lambda: {"": self._evaluate(outputs)}, finish, v)

    def _evaluate(self, outputs: Outputs) -> Tensor:
        with torch.no_grad(), _evaluating(self._model, self._eval_mode):
            return outputs(self._model)

    def _pullback(self, outputs: Outputs, weights: Tensor | None = None) -> dict[str, Tensor]:
        return pullback(self._model, self.parameters, outputs, weights, eval_mode=self._eval_mode)

    def _difference(self, f: Evaluate, finish: Finish, v: Vector) -> dict[str, Tensor]:
        length = norm(v.values())
        if length == 0:
            return {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        with restored(self.parameters) as origin:
            unit = (1 + norm(origin.values())) / length

            def product(step: float) -> dict[str, Tensor]:
                quotient = self._quotient(f, origin, v, step * unit)
                displace(self.parameters, origin)
                return finish(quotient)

            if self._check == "never":
                return product(self._step)
            found = _settle(product, self._step, self._tolerance)
        self.error = found.error
        if not found.error <= max(0.1, self._tolerance):
            _complain(found.error)
        if self._check == "first":
            self._step, self._check = found.step, "never"
        return found.product

    def _quotient(self, f: Evaluate, origin: Vector, v: Vector, h: float) -> dict[str, Tensor]:
        displace(self.parameters, origin, v, h)
        ahead = f()
        displace(self.parameters, origin, v, -h)
        return {name: (ahead[name] - behind) / (2 * h) for name, behind in f().items()}


@dataclass(frozen=True)
class _Settled:
    """A product, the step that made it and the predicted bound of its relative error."""

    product: dict[str, Tensor]
    step: float
    error: float


def _settle(
    product: Callable[[float], dict[str, Tensor]], step: float, tolerance: float
) -> _Settled:
    """The product at ``step`` if half of it confirms it, or the best at shorter and longer ones."""
    best = _compared(product(step), product(step / 2), step)
    for factor in (0.25, 4.0):
        for _ in range(_TRIALS):
            if best.error <= tolerance:
                return best
            tried = best.step * factor
            found = _compared(product(tried), product(tried / 2), tried)
            if not found.error < best.error:
                break
            best = found
    return best


def _compared(whole: dict[str, Tensor], half: dict[str, Tensor], step: float) -> _Settled:
    length, distance = norm(whole.values()), norm(whole[n] - half[n] for n in whole)
    error = 2 * (distance / length if length > 0 else distance)
    return _Settled(whole, step, error if math.isfinite(error) else math.inf)


def _complain(error: float) -> None:
    if not math.isfinite(error):
        raise FloatingPointError(
            "a finite difference is not finite at any step: the weights hold NaN or infinity, or "
            "the model overflows beside them"
        )
    warnings.warn(
        f"a finite difference is off by up to {error:.0%} of its length; use "
        'method="exact", float64 weights or another step',
        stacklevel=5,
    )
