"""The guarded step in plain torch: the truth that every faster path is held to."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from safeopt.correction import Correction, StepGuard
from safeopt.distributed import Ranks, local, reshard
from safeopt.isolation import autocast
from safeopt.layouts import flattened_hint
from safeopt_kernels import dispatch, native

BaseStep = Callable[[Optimizer], Any]
Displacements = Iterator[tuple[str, Tensor]]
Read = Callable[[Tensor], Tensor]
Held = TypeVar("Held", bound=Optimizer)
Rest = ParamSpec("Rest")
MovedBy = Callable[[Optimizer, dict[str, Tensor], BaseStep, float, Read], Displacements]

# Weights copied at a time: few enough to stay in cache, enough to make small tensors cheap.
_CHUNK_ELEMENTS = 1 << 20
_MOMENTUM_KEYS = ("exp_avg", "momentum_buffer")


class Storage:
    """How a step reads and writes weights; this one works on the parameters' own memory."""

    def read(self, parameter: Tensor) -> Tensor:
        """What the weights are, as far as this process holds them."""
        return local(parameter)

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Store what `read` gave and a step has changed."""


class OpenWeights(Mapping[str, Tensor]):
    """Weights by name: read when asked for, written when the next ones are, or asked for again."""

    def __init__(self, parameters: Mapping[str, Tensor], storage: Storage) -> None:
        self._parameters, self._storage = parameters, storage
        self._open: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        self.close()
        self._open[name] = self._storage.read(self._parameters[name])
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def close(self) -> None:
        """Write what is open."""
        for name, value in self._open.items():
            self._storage.write(self._parameters[name], value)
        self._open.clear()


def in_own_precision(
    step: Callable[Concatenate[Held, StepGuard, Rest], None],
) -> Callable[Concatenate[Held, StepGuard, Rest], None]:
    """A guarded step as no training loop around it changes it: without autocast, not compiled.

    Autocast would round what the guard multiplies, and let a refresh, which runs the model,
    measure in another precision than the thresholds were. A refresh cannot be traced.
    """

    @functools.wraps(step)
    def alone(
        optimizer: Held, guard: StepGuard, /, *args: Rest.args, **kwargs: Rest.kwargs
    ) -> None:
        with autocast(guard.model, {}):
            step(optimizer, guard, *args, **kwargs)

    return torch._disable_dynamo(alone)


@in_own_precision
def guarded_step(
    optimizer: Optimizer,
    guard: StepGuard,
    base_step: BaseStep,
    moved_by: MovedBy | None = None,
    storage: Storage | None = None,
    *,
    has_gradients: bool = True,
) -> None:
    """Take one step of ``base_step`` that stays on the guard's level set.

    The displacement s is what the base optimizer has really stored: preconditioning, learning
    rate and weight decay included. The guard's correction sees the displacement of each parameter
    and then writes what it takes out or adds.

    Args:
        optimizer: the optimizer whose parameters move.
        guard: the guard of the model they belong to.
        base_step: one unguarded step of ``optimizer``.
        moved_by: how the step is taken, `chunk_by_chunk` or `all_at_once`; the former by default.
        storage: how weights are read and written; in place by default.
        has_gradients: False if ``base_step`` makes the gradients and checks them itself.

    Raises:
        ValueError: a parameter does not belong to the guard's model, or has a sparse gradient.
        FloatingPointError: a gradient or an anchor loss is not finite. Weights and optimizer
            state are untouched.
    """
    parameters, correction = begin(optimizer, guard, has_gradients=has_gradients)
    moves, storage = moved_by or chunk_by_chunk, storage or Storage()
    weights = OpenWeights(parameters, storage)
    for name, displacement in moves(optimizer, parameters, base_step, guard.brake, storage.read):
        correction.observe(name, weights[name], displacement)
        weights.close()
    correction.finish(weights)
    weights.close()


def begin(
    optimizer: Optimizer, guard: StepGuard, *, has_gradients: bool = True
) -> tuple[dict[str, Tensor], Correction]:
    """Everything in a guarded step that can fail: returns its parameters and its correction.

    Args:
        optimizer: the optimizer whose parameters move.
        guard: the guard of the model they belong to.
        has_gradients: False if a closure is yet to make them; those of the last step are stale.

    Raises:
        ValueError: a parameter does not belong to the guard's model, or has a sparse gradient.
        FloatingPointError: a gradient or an anchor loss is not finite. Weights and optimizer
            state are untouched.
    """
    parameters = named_parameters(optimizer, guard)
    if has_gradients:
        check_gradients(parameters)
    # A parameter that has been frozen keeps its momentum and must not move along it.
    training = {name: p for name, p in parameters.items() if p.requires_grad}
    guard.refresh_if_due(frozenset(training))
    return parameters, guard.correction(lambda: momentum_of(optimizer, training))


def still_step(optimizer: Optimizer, guard: StepGuard, base_step: BaseStep) -> None:
    """Take a step whose learning rates are all zero: state may change, weights do not.

    The guard is not asked: there is nothing to correct, and torch's distributed checkpoints take
    such a step of their own accord to make the optimizer's state.
    """
    parameters = named_parameters(optimizer, guard)
    check_gradients(parameters)
    for _ in chunk_by_chunk(optimizer, parameters, base_step):
        pass


def named_parameters(optimizer: Optimizer, guard: StepGuard) -> dict[str, Tensor]:
    """The optimizer's parameters by their name in the guard's model.

    Raises:
        ValueError: a parameter is not one of the model's.
    """
    reshard(guard.model)
    names = {id(p): name for name, p in guard.model.named_parameters()}
    parameters = {}
    for index, group in enumerate(optimizer.param_groups):
        for position, p in enumerate(group["params"]):
            if id(p) not in names:
                raise ValueError(
                    f"parameter {position} of group {index} (shape {tuple(p.shape)}) is not in "
                    "the guard's model; build the guard and the optimizer from the same model"
                    + flattened_hint(p)
                )
            parameters[names[id(p)]] = p
    return parameters


def check_gradients(parameters: dict[str, Tensor]) -> None:
    """Raise if a gradient is sparse or, on any process, not finite; nothing has changed yet."""
    gradients = {n: local(p.grad) for n, p in parameters.items() if p.grad is not None}
    gradients = {n: gradient for n, gradient in gradients.items() if gradient.numel()}
    for name, gradient in gradients.items():
        if gradient.is_sparse:
            raise ValueError(
                f"the gradient of {name!r} is sparse, which a guard does not handle: build its "
                "embedding with sparse=False"
            )
    is_good, finite = _are_surely_finite(list(gradients.values())), list[Tensor]()
    if not is_good:
        is_good, finite = _finite(list(gradients.values()), torch.inf)
    if not Ranks.of(parameters).any_shard(not is_good):
        return
    bad = [repr(name) for name, f in zip(gradients, finite, strict=False) if not bool(f)]
    raise FloatingPointError(
        f"the gradient of {bad[0] if bad else 'a parameter on another process'} is not finite, so "
        "the step was not taken: the loss is NaN or overflowed; skip this batch, clip gradients "
        "or lower the learning rate"
    )


def _are_surely_finite(gradients: list[Tensor]) -> bool:
    """The fast look: it never says yes wrongly, and no wrongly where a square overflows."""
    if dispatch.is_native(gradients):
        return native.all_finite(gradients)
    return _finite(gradients, 2.0)[0]


def _finite(gradients: list[Tensor], order: float) -> tuple[bool, list[Tensor]]:
    """Whether all norms of this order are finite, and which."""
    norms = torch._foreach_norm(gradients, order) if gradients else []
    finite = [norm.isfinite() for norm in norms]
    # One look for all of them: each look makes the host wait for the device.
    return not finite or bool(torch.stack([f.to(finite[0].device) for f in finite]).all()), finite


def chunk_by_chunk(
    optimizer: Optimizer,
    parameters: dict[str, Tensor],
    base_step: BaseStep,
    brake: float = 1.0,
    read: Read = local,
) -> Displacements:
    """Step a few parameters at a time and yield each one's name and displacement.

    For optimizers whose step treats parameters one by one; the memory beyond theirs is about a
    copy of the largest parameter. The learning rate is multiplied by ``brake`` for this step
    alone. A displacement lives in a scratch buffer and is overwritten once the next one is asked
    for.
    """
    groups = optimizer.param_groups
    names = {id(p): name for name, p in parameters.items()}
    scratch = torch.empty(0)
    try:
        for group in groups:
            for chunk in chunks([p for p in group["params"] if p.grad is not None]):
                scratch, before = _copies(scratch, [read(p) for p in chunk])
                lr = group["lr"] * brake if brake < 1 else group["lr"]
                optimizer.param_groups = [{**group, "params": chunk, "lr": lr}]
                base_step(optimizer)
                for p, old in zip(chunk, before, strict=True):
                    yield names[id(p)], torch.sub(read(p), old, out=old)
    finally:
        optimizer.param_groups = groups


def all_at_once(
    optimizer: Optimizer,
    parameters: dict[str, Tensor],
    base_step: BaseStep,
    brake: float = 1.0,
    read: Read = local,
) -> Displacements:
    """Step all parameters together and yield each one's name and displacement.

    For optimizers that share state between parameters, or of which nothing is known; it takes a
    copy of all parameters. The learning rate is multiplied by ``brake`` for this step alone. If
    ``base_step`` raises, as a closure may at any call, the weights are those before it.
    """
    before = {name: read(p).clone() for name, p in parameters.items()}
    with _taken_back(optimizer, parameters, before, read), _braked(optimizer.param_groups, brake):
        base_step(optimizer)
    for name, p in parameters.items():
        yield name, torch.sub(read(p), before.pop(name))


@contextmanager
def _taken_back(
    optimizer: Optimizer, parameters: dict[str, Tensor], before: dict[str, Tensor], read: Read
) -> Iterator[None]:
    """On an error put the weights back, and the state but for what was changed in place."""
    state = {key: copy.copy(kept) for key, kept in optimizer.state.items()}
    try:
        yield
    except BaseException:
        for name, p in parameters.items():
            read(p).copy_(before[name])
        optimizer.state.clear()
        optimizer.state.update(state)
        raise


@contextmanager
def _braked(groups: list[dict[str, Any]], brake: float) -> Iterator[None]:
    """Shorten the learning rates of ``groups`` for a while."""
    if brake >= 1:
        yield
        return
    rates = [group["lr"] for group in groups]
    shorter = [rate * brake for rate in rates]
    for group, rate in zip(groups, shorter, strict=True):
        group["lr"] = rate
    try:
        yield
    finally:
        for group, rate, lent in zip(groups, rates, shorter, strict=True):
            if group["lr"] is lent:  # an optimizer that sets its own rate keeps what it has set
                group["lr"] = rate


def _copies(scratch: Tensor, parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copies of tensors in ``scratch``, which grows when it is too small."""
    sizes = [part.numel() for part in parts]
    first = parts[0]
    if (scratch.dtype, scratch.device) != (first.dtype, first.device) or len(scratch) < sum(sizes):
        scratch = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
    pieces = scratch[: sum(sizes)].split(sizes)
    copies = [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
    torch._foreach_copy_(copies, parts)
    return scratch, copies


def chunks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive parameters of one type, up to ``_CHUNK_ELEMENTS`` together, or one."""
    chunk: list[Tensor] = []
    for p in parameters:
        fits = sum(q.numel() for q in chunk) + p.numel() <= _CHUNK_ELEMENTS
        if chunk and not (fits and (p.dtype, p.device) == (chunk[0].dtype, chunk[0].device)):
            yield chunk
            chunk = []
        chunk.append(p)
    if chunk:
        yield chunk


def momentum_of(optimizer: Optimizer, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's first moments by parameter name, this process's part of each."""
    found = {}
    for name, p in parameters.items():
        state = optimizer.state.get(p, {})
        moment = next((state[key] for key in _MOMENTUM_KEYS if key in state), None)
        if isinstance(moment, Tensor):
            found[name] = local(moment)
    return found
