"""Which trainable parameters have a rule, and that the others are named, ignored or frozen."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import safeopt
from safeopt.geometry import find_coverage
from tests.zoo import VOCABULARY, random_anchors, trainable

WIDTH = 8


class Model(nn.Module):
    """Embedding, one layer or two, head; a table may be shared."""

    def __init__(self, inner: nn.Module | None = None, table: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = table or nn.Embedding(VOCABULARY, WIDTH)
        self.inner, self.head = inner or nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x + self.inner(x))


class Adapted(nn.Linear):
    """loralib's Linear, in short: a layer that owns its adapter."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.lora_A = nn.Parameter(torch.randn(2, WIDTH))
        self.lora_B = nn.Parameter(torch.randn(WIDTH, 2))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.lora_A.T @ self.lora_B.T


class Shifted(nn.Embedding):
    """An embedding with a parameter beyond its table."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, WIDTH)
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.bias


class Attention(nn.Module):
    """Self-attention of torch, which uses its output matrix without calling its module."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x, need_weights=False)[0]


def normalised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))


def clipped_and_tied() -> nn.Module:
    """A table whose other use has a rule."""
    model = Model(table=nn.Embedding(VOCABULARY, WIDTH, max_norm=1.0))
    model.head.weight = model.embed.weight
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "loralib": (lambda: Model(Adapted()), ["inner.lora_A", "inner.lora_B"]),
    "weight_norm": (lambda: Model(normalised()), ["inner.weight_g", "inner.weight_v"]),
    "embedding": (lambda: Model(table=Shifted()), ["embed.bias"]),
    "attention": (
        lambda: Model(Attention()),
        [f"inner.attend.{n}" for n in ("in_proj_weight", "in_proj_bias")]
        + [f"inner.attend.out_proj.{n}" for n in ("weight", "bias")],
    ),
    "tied": (clipped_and_tied, ["embed.weight"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_a_layers_rule_does_not_know_is_named_ignored_or_frozen(kind: str) -> None:
    make, names = MODELS[kind]
    coverage = find_coverage(make())
    assert list(coverage.uncovered) == names
    assert coverage.covered == set(trainable(make())) - set(names)
    with pytest.raises(ValueError, match="no rule covers the trainable") as caught:
        safeopt.Guard(make(), random_anchors())
    assert all(repr(name) in str(caught.value) for name in names)
    for choice in ("ignore", "freeze"):
        model = make()
        guard = safeopt.Guard(model, random_anchors(), uncovered=choice)
        guard.refresh()
        assert (set(names) <= set(trainable(model))) == (choice == "ignore")
        assert guard.sketch is not None
        assert set(guard.sketch.blocks) == set(trainable(make())) - set(names)


def test_a_layer_whose_known_parameters_are_frozen_is_no_site() -> None:
    model = Model(Adapted())
    for p in (*model.embed.parameters(), *model.head.parameters(), model.inner.weight):
        p.requires_grad_(False)
    model.inner.bias.requires_grad_(False)
    assert not find_coverage(model).sites
    assert find_coverage(model).uncovered == ("inner.lora_A", "inner.lora_B")
