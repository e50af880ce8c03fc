"""Adapters: what trains is guarded, the base stays as it was, merging is safe."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

import safeopt
from tests.zoo import (
    VOCABULARY,
    dora_llama,
    llama,
    lora_llama,
    random_anchors,
    take_training_step,
    trainable,
)

LORA = {"r": 4, "target_modules": "all-linear"}


def train(model: nn.Module, guard: safeopt.Guard, steps: int = 4, seed: int = 0) -> None:
    optimizer = safeopt.SafeAdamW(trainable(model).items(), lr=1e-2, guard=guard)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(0, VOCABULARY, (4, 10), generator=generator)
        take_training_step(model, optimizer, batch)


@pytest.mark.trap("optimizers 5.1.20")
@pytest.mark.supports(host="plain loop", feature="LoRA")
@pytest.mark.supports(host="plain loop", feature="DoRA")
@pytest.mark.parametrize("make", [lora_llama, dora_llama])
def test_only_the_adapter_moves_and_merging_keeps_what_it_learned(make: Any) -> None:
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    guard = safeopt.Guard(model, random_anchors(), refresh_every=2, budget=-0.5)
    train(model, guard)
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), before[name]) != p.requires_grad, name
    ids = torch.randint(0, VOCABULARY, (2, 9))
    trained = model.eval()(ids).logits
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(ids).logits, trained, rtol=0, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_a_guard_built_before_the_adapter_takes_the_same_steps() -> None:
    weights = []
    anchors, base = random_anchors(), llama()
    for guard_first in (True, False):
        bare = copy.deepcopy(base)
        early = safeopt.Guard(bare, anchors, refresh_every=2) if guard_first else None
        torch.manual_seed(0)
        model = get_peft_model(bare, LoraConfig(**LORA))
        train(model, early or safeopt.Guard(model, anchors, refresh_every=2))
        weights.append({name: p.detach() for name, p in trainable(model).items()})
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_merged_adapters_are_noticed_before_a_step() -> None:
    model = lora_llama()
    guard = safeopt.Guard(model, random_anchors(), refresh_every=1)
    train(model, guard)
    model.merge_adapter()
    with pytest.raises(ValueError, match="are its adapters merged or disabled"):
        guard.refresh()
    model.unmerge_adapter()
    guard.refresh()


@pytest.mark.parametrize(
    ("adapter", "parameter"),
    [
        (LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), "lora_embedding_A"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "ia3_l"),
    ],
)
def test_adapters_without_a_rule_are_named(adapter: Any, parameter: str) -> None:
    base, anchors = llama(), random_anchors()
    early = safeopt.Guard(base, anchors)
    model = get_peft_model(base, adapter)
    with pytest.raises(ValueError, match=f"no rule covers the trainable.*{parameter}"):
        safeopt.Guard(model, anchors)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"no rule covers the trainable.*{parameter}"):
        train(model, early)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_head_that_trains_beside_the_adapter_is_guarded() -> None:
    model = get_peft_model(llama(), LoraConfig(**LORA, modules_to_save=["lm_head"]))
    guard = safeopt.Guard(model, random_anchors(), refresh_every=2)
    train(model, guard)
    assert guard.sketch is not None
    assert any("modules_to_save" in name for name in guard.sketch.blocks)
    assert set(guard.sketch.blocks) == set(trainable(model))


@pytest.mark.supports(host="plain loop", feature="LoRA on 4 bits")
def test_adapter_on_a_four_bit_base_is_guarded() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = llama(hidden_size=64, intermediate_size=64)
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False)
            packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, packed.to("cpu"))
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    guard = safeopt.Guard(model, random_anchors(), refresh_every=2, budget=-0.5)
    packed_before = model.get_submodule(
        "base_model.model.model.layers.0.self_attn.q_proj"
    ).base_layer.weight.data.clone()
    train(model, guard)
    packed_after = model.get_submodule(
        "base_model.model.model.layers.0.self_attn.q_proj"
    ).base_layer.weight.data
    assert packed_before.dtype == torch.uint8
    assert torch.equal(packed_before, packed_after)
    assert guard.metrics()["safety/removed_fraction"] > 0
    assert guard.metrics()["safety/retraction_ratio"] > 0
