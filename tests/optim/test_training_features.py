"""Guarded steps in training loops that scale, accumulate, compile or recompute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import safeopt
from tests.zoo import VOCABULARY, llama, random_anchors, take_training_step

Weights = dict[str, Tensor]


class Run:
    """One model, its anchors and batches, trained in several ways from the same start."""

    def __init__(self) -> None:
        self.start, self.anchors = llama(), random_anchors()
        self.batches = [torch.randint(0, VOCABULARY, (8, 10)) for _ in range(4)]

    def build(
        self,
        prepare: Callable[[nn.Module], nn.Module] | None = None,
        guard: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        model = copy.deepcopy(self.start)
        model = model if prepare is None else prepare(model)
        settings = {"budget": -0.3, "step_limit": 1.0, "refresh_every": 2, **(guard or {})}
        held = safeopt.Guard(model, self.anchors, **settings)
        named = list(model.named_parameters())
        return model, safeopt.SafeAdamW(named, lr=2e-3, eps=1e-3, guard=held, **options)

    def weights(self, prepare: Callable[[nn.Module], nn.Module] | None = None) -> Weights:
        model, optimizer = self.build(prepare)
        for batch in self.batches:
            take_training_step(model, optimizer, batch)
        return plain_names(model)


def plain_names(model: nn.Module) -> Weights:
    return {
        n.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): p.detach().clone()
        for n, p in model.named_parameters()
    }


def assert_close(found: Weights, expected: Weights) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.trap("optimizers 5.1.12")
@pytest.mark.supports(host="plain loop", feature="accumulation")
def test_one_by_eight_equals_eight_by_one() -> None:
    run = Run()
    model, optimizer = run.build()
    for batch in run.batches:
        optimizer.zero_grad()
        for row in batch.split(1):
            (model(input_ids=row, labels=row).loss / len(batch)).backward()
        optimizer.step()
    assert_close(plain_names(model), run.weights())


@pytest.mark.trap("optimizers 5.1.13", "ux 2.3.7")
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_grad_scaler_skips_an_infinite_step_and_touches_nothing(options: dict[str, bool]) -> None:
    run = Run()
    model, optimizer = run.build(**options)
    scaler = GradScaler("cpu", init_scale=8.0)
    for number, batch in enumerate([run.batches[0], run.batches[0], *run.batches[1:]]):
        optimizer.zero_grad()
        scaler.scale(model(input_ids=batch, labels=batch).loss).backward()
        if number == 1:  # skipped, and taken once more without the infinity
            next(model.parameters()).grad.view(-1)[0] = float("inf")
            before = state_of(model, optimizer)
        scaler.step(optimizer)
        scaler.update()
        if number == 1:
            torch.testing.assert_close(state_of(model, optimizer), before, rtol=0, atol=0)
            assert scaler.get_scale() == 4.0
    expected = Run()
    expected.start, expected.anchors = run.start, run.anchors
    expected.batches = [run.batches[0], *run.batches[1:]]
    assert_close(plain_names(model), expected.weights())


def state_of(model: nn.Module, optimizer: Any) -> Any:
    guard = optimizer.guard.state_dict()
    sketch = guard.pop("frame")[0]["sketch"]["blocks"]
    return copy.deepcopy(
        [plain_names(model), dict(optimizer.state_dict()["state"]), sketch, guard["schedule"]]
    )


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")


def with_compiled_layers(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize("compiling", [compiled, with_compiled_layers])
def test_a_compiled_model_takes_the_same_steps(
    compiling: Callable[[nn.Module], nn.Module],
) -> None:
    run = Run()
    assert_close(run.weights(compiling), run.weights())


@pytest.mark.parametrize("compression", [None, 2])
def test_a_step_inside_autocast_is_the_step_outside(compression: int | None) -> None:
    run = Run()

    def weights(inside: bool) -> Weights:
        model, optimizer = run.build(guard={"compression_rank": compression})
        for batch in run.batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                model(input_ids=batch, labels=batch).loss.backward()
                if inside:
                    optimizer.step()
            if not inside:
                optimizer.step()
        return plain_names(model)

    torch.testing.assert_close(weights(inside=True), weights(inside=False), rtol=0, atol=0)


def test_a_closure_runs_under_the_autocast_around_it() -> None:
    run, dtypes = Run(), list[torch.dtype]()
    model = copy.deepcopy(run.start)
    guard = safeopt.Guard(model, run.anchors)
    optimizer = safeopt.guarded(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2), guard)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = model(input_ids=run.batches[0]).logits
        dtypes.append(logits.dtype)
        loss = logits.float().square().mean()
        loss.backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
    assert set(dtypes) == {torch.bfloat16}
    assert guard.metrics()["safety/leak"] < 1e-4


@pytest.mark.trap("optimizers 5.1.17")
def test_a_compiled_step_is_the_same_step() -> None:
    run = Run()
    model, optimizer = run.build()
    step = torch.compile(optimizer.step, backend="aot_eager")
    for batch in run.batches:
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        step()
    assert_close(plain_names(model), run.weights())


def by_transformers(model: Any, *, reentrant: bool) -> nn.Module:
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    model.enable_input_require_grads()
    return model


def by_torch(model: Any, *, reentrant: bool) -> nn.Module:
    """Recomputes in evaluation mode as well."""
    model.config.use_cache = False  # the second forward would find the first one's keys in it
    impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    kinds = {type(layer) for layer in model.model.layers}
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, checkpoint_impl=impl),
        check_fn=lambda m: type(m) in kinds,
    )
    return model


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", [by_transformers, by_torch])
def test_activation_checkpointing_of_both_kinds(how: Callable[..., Any], reentrant: bool) -> None:
    run = Run()
    assert_close(run.weights(lambda model: how(model, reentrant=reentrant)), run.weights())
    assert torch.utils.checkpoint.CheckpointFunction.__name__ == "CheckpointFunction"


class Hidden(nn.Module):
    """Runs a layer that trains without a graph, as an unknown checkpointing function would."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.inner = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        with torch.no_grad():
            y = self.inner(x)
        return self.head(x + y)


def test_a_module_that_runs_without_a_graph_is_named() -> None:
    guard = safeopt.Guard(Hidden(), random_anchors())
    with pytest.raises(TypeError, match=r"'inner' ran without an autograd graph.*freeze"):
        guard.refresh()
