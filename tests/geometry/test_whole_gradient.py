"""Uses of a weight that no hook sees are an error, and rounding is none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import safeopt
from safeopt.geometry.blocks import Block, DenseBlock, LowRankBlock, RowsBlock
from tests.zoo import ARCHITECTURES, VOCABULARY, gpt2, llama, lora_llama, random_anchors, trainable

WIDTH = 8


class Model(nn.Module):
    """Embedding, layer and head; ``use`` says what is computed besides calling them."""

    def __init__(self, use: str | None = None) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head, self.use = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY), use

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        mixed = F.linear(x, self.mix.weight) if self.use == "never called" else self.mix(x)
        x = self.norm(x + mixed.tanh())
        if self.use == "matrix":
            x = x + F.linear(x, self.mix.weight)
        if self.use == "bias":
            x = x + self.mix.bias
        if self.use == "norm":
            x = x * self.norm.weight
        return x @ self.embed.weight.T if self.use == "tied" else self.head(x)


class Scaled(nn.Embedding):
    """Scales what an embedding returns, as Gemma's does."""

    def forward(self, input: Tensor) -> Tensor:
        return 3.0 * super().forward(input)


def scaled() -> nn.Module:
    model = Model()
    model.embed = Scaled(VOCABULARY, WIDTH)
    return model


UNSEEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tied": (lambda: Model("tied"), "embed.weight"),
    "matrix": (lambda: Model("matrix"), "mix.weight"),
    "bias": (lambda: Model("bias"), "mix.bias"),
    "norm": (lambda: Model("norm"), "norm.weight"),
    "never called": (lambda: Model("never called"), "mix.weight"),
    "scaled": (scaled, "embed.weight"),
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_a_use_that_no_hook_sees_is_named_before_anything_has_changed(kind: str) -> None:
    make, name = UNSEEN[kind]
    model = make()
    guard = safeopt.Guard(model, random_anchors())
    optimizer = safeopt.SafeAdamW(model.parameters(), lr=1e-2, guard=guard)
    model(torch.randint(0, VOCABULARY, (2, 6))).logsumexp(-1).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"the gradients of \['{name}'\]: .* call the module"):
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not optimizer.state
    assert guard.sketch is None
    assert all(p._backward_hooks is None for p in model.parameters())
    dict(model.named_parameters())[name].requires_grad_(False)
    guard.refresh()


def test_it_is_looked_for_when_other_parameters_train_than_before() -> None:
    model = Model()
    model.embed.requires_grad_(False)
    guard = safeopt.Guard(model, random_anchors())
    guard.refresh()
    model.use = "matrix"
    guard.refresh()
    model.embed.requires_grad_(True)
    with pytest.raises(ValueError, match=r"mix\.weight"):
        guard.refresh()


class Autocast(nn.Module):
    """A model that computes in mixed precision and makes its loss tiny."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.model, self.dtype, self.scale = model, dtype, scale

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            logits: Tensor = self.model(input_ids, position_ids=position_ids).logits
        return self.scale * logits


def key_biases() -> nn.Module:
    """GPT-2, whose keys' biases have no gradient but rounding."""
    model = gpt2()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("c_attn.bias"))
    return model


def fresh_adapter() -> nn.Module:
    model = lora_llama()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(p)
    return model


def checkpointed(*, reentrant: bool) -> nn.Module:
    model: Any = llama().train()
    options = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()
    return model


SEEN: dict[str, Callable[[], nn.Module]] = {
    **ARCHITECTURES,
    "key biases": key_biases,
    "fresh adapter": fresh_adapter,
    "sparse": lambda: nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH, sparse=True), nn.Linear(WIDTH, VOCABULARY)
    ),
    "reentrant": lambda: checkpointed(reentrant=True),
    "checkpointed": lambda: checkpointed(reentrant=False),
    **{
        f"{dtype}": lambda dtype=dtype: gpt2().to(dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
    },
    **{
        f"{make.__name__} in autocast to {dtype}": lambda make=make, dtype=dtype: Autocast(
            make(), dtype
        )
        for make in (llama, gpt2, lora_llama, key_biases)
        for dtype in (torch.bfloat16, torch.float16)
    },
    "fp16 that underflows": lambda: Autocast(llama(), torch.float16, 1e-5),
}


@pytest.mark.parametrize("kind", SEEN)
def test_rounding_and_silence_are_no_alarm(kind: str) -> None:
    model = SEEN[kind]()
    guard = safeopt.Guard(model, random_anchors(8), anchors_per_refresh=8)
    guard.refresh()
    assert guard.frame.names == set(trainable(model))


def test_hooks_of_the_parameters_stay_and_do_not_see_a_refresh() -> None:
    model = Model()
    seen: list[Tensor] = []

    def hook(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return torch.zeros_like(gradient)

    handle = model.mix.weight.register_hook(hook)
    after = model.mix.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    guard = safeopt.Guard(model, random_anchors())
    guard.refresh()
    assert not seen
    assert all(p.grad is None for p in model.parameters())
    model(torch.randint(0, VOCABULARY, (2, 6))).logsumexp(-1).sum().backward()
    assert len(seen) == 2
    assert not bool(model.mix.weight.grad.any())
    handle.remove()
    after.remove()
    model(torch.randint(0, VOCABULARY, (2, 6))).logsumexp(-1).sum().backward()
    assert len(seen) == 2
    assert bool(model.mix.weight.grad.any())


@pytest.mark.parametrize(
    "block",
    [
        LowRankBlock(torch.randn(3, 2, 5), torch.randn(3, 2, 4)),
        RowsBlock(torch.randint(0, 5, (3, 6)), torch.randn(3, 6, 4)),
        DenseBlock(torch.randn(3, 20)),
    ],
    ids=lambda block: type(block).__name__,
)
def test_a_block_times_vectors(block: Block) -> None:
    vectors = torch.randn(4, 2)
    assert len(block) == len(block.times(vectors)) == 3
    expected = block.dense(torch.Size((5, 4))) @ vectors
    torch.testing.assert_close(block.times(vectors).dense(torch.Size((5, 2))), expected)
