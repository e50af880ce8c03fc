"""How products are made: what they leave behind, what they refuse, and which hosts they work in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from safeopt.curvature import (
    FiniteDifference,
    Fisher,
    GaussNewton,
    Hessian,
    Prediction,
    reply_predictions,
)
from safeopt.curvature.vectors import trainable_parameters
from tests.zoo import (
    ARCHITECTURES,
    VOCABULARY,
    llama,
    random_anchors,
    random_step,
    relative_error,
    trainable,
)


def qwen() -> nn.Module:
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return Qwen2ForCausalLM(config)


# PEFT's DoRA passes no gradient through its weight norm, so its gradient is not the derivative of
# its loss, and there is no Hessian for two routes to agree on.
HOSTS = {**{n: make for n, make in ARCHITECTURES.items() if "dora" not in n}, "qwen": qwen}


def token_loss(ids: Tensor) -> Any:
    return lambda model: model(input_ids=ids, labels=ids).loss


def random_ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 9))


@pytest.mark.trap("optimizers 0.7")
@pytest.mark.parametrize("host", HOSTS)
def test_both_routes_agree_with_the_default_attention(host: str) -> None:
    model, loss = HOSTS[host]().train(), token_loss(random_ids())
    assert model.config.to_dict().get("_attn_implementation", "sdpa") == "sdpa"
    v = random_step(model, 1.0)
    exact = Hessian(model, loss).matvec(v)
    finite = Hessian(model, loss, method="finite_difference")
    measured = finite.matvec(v)
    for name in v:
        assert measured[name].shape == exact[name].shape
    flat = [torch.cat([h[n].flatten() for n in v]) for h in (measured, exact)]
    assert relative_error(*flat) <= finite.predicted_error + 1e-5


class State:
    """Everything that a product must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        for p in trainable(model).values():
            p.grad = torch.randn_like(p)
        self.held = {n: (p, p.grad) for n, p in trainable(model).items()}
        self.weights = {n: p.detach().clone() for n, p in trainable(model).items()}
        self.gradients = {n: p.grad.clone() for n, p in trainable(model).items()}
        self.rng = torch.get_rng_state()

    def check(self) -> None:
        for name, p in trainable(self.model).items():
            assert torch.equal(p, self.weights[name]), name
            assert (p, p.grad)[1] is self.held[name][1], name
            assert torch.equal(p.grad, self.gradients[name]), name
        assert torch.equal(torch.get_rng_state(), self.rng)
        assert all(m.training for m in self.model.modules())


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, Fisher])
@pytest.mark.parametrize("method", ["exact", "finite_difference"])
def test_products_leave_no_trace(kind: Any, method: str) -> None:
    model = llama(attention_dropout=0.3).train()
    predict = reply_predictions(random_anchors().batch())
    v, state = random_step(model, 1.0), State(model)
    operator = kind(model, (lambda m: predict(m).loss()) if kind is Hessian else predict,
                    method=method)  # fmt: skip
    first = operator.matvec(v)
    assert any(bool(h.abs().sum() > 0) for h in first.values())
    state.check()


class Failing:
    """A loss that raises at its k-th evaluation, counted over all that come before."""

    def __init__(self, ids: Tensor, at: int) -> None:
        self.loss, self.left = token_loss(ids), at

    def __call__(self, model: nn.Module) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.loss(model)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_weights_come_back_bit_for_bit_after_an_exception(at: int) -> None:
    model = llama().train()
    with torch.no_grad():  # values that adding and subtracting a step would not give back
        for p in model.parameters():
            p.mul_(torch.rand_like(p) * 1e4)
    v, loss, state = random_step(model, 1.0), Failing(random_ids(), at), State(model)
    with pytest.raises(KeyboardInterrupt):
        Hessian(model, loss, method="finite_difference").matvec(v)
    state.check()


def test_adding_a_step_back_would_not_restore_the_weights() -> None:
    """The reason for the snapshot."""
    p, v = torch.randn(10_000), torch.randn(10_000)
    assert not torch.equal((p + 0.01 * v) - 0.01 * v, p)


@pytest.mark.trap("optimizers 0.9")
def test_half_precision_is_refused() -> None:
    model = llama().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"need float32 weights.*model\.float\(\)"):
        Hessian(model, token_loss(random_ids()), method="finite_difference")


def test_steps_that_overflow_are_an_error_and_rough_ones_a_warning() -> None:
    model = nn.Linear(4, 1, bias=False)

    def rough(m: nn.Linear) -> Tensor:
        return (1e6 * m.weight).sin().sum()

    with pytest.warns(UserWarning, match="off by up to"):
        Hessian(model, rough, method="finite_difference").matvec(random_step(model, 1.0))
    with torch.no_grad():
        model.weight[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="not finite at any step"):
        Hessian(model, rough, method="finite_difference").matvec(random_step(model, 1.0))


@pytest.mark.trap("ux 0.7")
def test_the_step_is_found_when_the_first_is_too_long_or_too_short() -> None:
    model, ids = llama(), random_ids()
    v = random_step(model, 1.0)
    truth = Hessian(model, token_loss(ids)).flat(flat(v))
    for start in (1.0, 1e-6):
        finite = Hessian(model, token_loss(ids), method=FiniteDifference(model, step=start))
        assert relative_error(finite.flat(flat(v)), truth) <= finite.predicted_error
        assert finite.predicted_error <= 0.05


def flat(v: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in v.values()])


def test_checking_once_settles_the_step() -> None:
    model, ids = llama(), random_ids()
    calls = []

    def loss(m: nn.Module) -> Tensor:
        calls.append(1)
        return token_loss(ids)(m)

    hessian = Hessian(model, loss, method=FiniteDifference(model, check="first"))
    hessian.matvec(random_step(model, 1.0))
    checked = len(calls)
    hessian.matvec(random_step(model, 1.0))
    assert checked >= 4
    assert len(calls) == checked + 2


def test_a_zero_vector_has_a_zero_product() -> None:
    model = llama()
    v = {name: torch.zeros_like(p) for name, p in trainable(model).items()}
    for kind in ("exact", "finite_difference"):
        product = Hessian(model, token_loss(random_ids()), method=kind).matvec(v)
        assert all(not bool(h.any()) for h in product.values())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model, ids = llama(), random_ids()
    v = random_step(model, 1.0)
    truth = Hessian(model, token_loss(ids)).flat(flat(v))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    seen: list[bool] = []
    layer = model.model.layers[0].mlp
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    kept = FiniteDifference(model, eval_mode=False)
    finite = Hessian(model, token_loss(ids), method=kept)
    assert relative_error(finite.flat(flat(v)), truth) <= finite.predicted_error + 1e-5
    handle.remove()
    assert len(seen) >= 8  # four gradients, each of which ran the layer twice


class ReverseOnly(torch.autograd.Function):
    """A logits layer whose gradient cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@pytest.mark.trap("ux 0.5")
def test_exact_names_what_to_do_where_derivatives_are_missing() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return ReverseOnly.apply(self.mix(x))

    model, x = Doubled(), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=r"attn_implementation=\"eager\".*finite_difference"):
        Hessian(model, lambda m: m(x).square().sum()).matvec(random_step(model))


def test_gauss_newton_never_differentiates_the_logits_twice() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return ReverseOnly.apply(self.inner(x))

    model, x, y = Head(), torch.randn(6, 5), torch.randint(0, 4, (6,))
    doubled = nn.Linear(5, 4)
    doubled.load_state_dict({n: 2 * w for n, w in model.inner.state_dict().items()})
    v = random_step(model, 1.0)
    finite = GaussNewton(model, lambda m: Prediction.of(m(x), y), method="finite_difference")
    plain = GaussNewton(doubled, lambda m: Prediction.of(m(x), y))
    twice = {name: 2 * v[f"inner.{name}"] for name in doubled.state_dict()}
    expected = plain.matvec(twice)
    for name, product in finite.matvec(v).items():
        truth = 2 * expected[name.removeprefix("inner.")]
        torch.testing.assert_close(product, truth, rtol=1e-2, atol=1e-4)
    gradient = torch.autograd.grad(
        Prediction.of(model(x), y).loss(), model.inner.weight, create_graph=True
    )[0]
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(gradient.sum(), model.inner.weight)


def test_optimizers_that_step_inside_backward_are_refused() -> None:
    model = nn.Linear(3, 1)
    model.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="post-accumulate-grad hook"):
        Hessian(model, lambda m: m(torch.ones(1, 3)).sum(), method="finite_difference").matvec(
            random_step(model)
        )


def test_names_belong_to_the_derivatives() -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="names"):
        Hessian(model, lambda m: m.weight.sum(), names=["weight"], method=FiniteDifference(model))
    assert set(trainable_parameters(model, ["bias"])) == {"bias"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        trainable_parameters(model)
