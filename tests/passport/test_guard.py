"""PassportGuard on real optimizers and architectures, LoRA among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import safeopt
from safeopt.geometry.capture import logits_of
from safeopt.geometry.input_subspace import InputSubspace
from safeopt.passport import Passport, PassportError
from safeopt.passport.guard import PassportGuard
from tests import zoo

BASES = {name: zoo.ARCHITECTURES[name] for name in ("llama", "tied-llama", "gpt2")}
STEPS = 4


@pytest.fixture(params=BASES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return BASES[request.param]().double().eval()


def few_anchors() -> safeopt.Anchors:
    return zoo.random_anchors(count=2, shortest=6, longest=9)


def logits(model: nn.Module, anchors: safeopt.Anchors) -> Tensor:
    batch = anchors.batch()
    with torch.no_grad():
        return logits_of(model.eval(), batch)[batch.attention_mask.bool()]


def train(model: nn.Module, guard: PassportGuard) -> list[float]:
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "guard": guard}
    optimizer = safeopt.SafeAdamW(model.named_parameters(), **options)
    batch = torch.randint(0, zoo.VOCABULARY, (4, 10))
    return [zoo.take_training_step(model, optimizer, batch) for _ in range(STEPS)]


def test_trains_and_leaves_the_anchors_where_they_were(model: nn.Module) -> None:
    anchors = few_anchors()
    subspace = InputSubspace.measure(model, anchors, energy=1.0)
    before = logits(model, anchors)
    guard = PassportGuard(model, subspace.pieces())
    losses = train(model, guard)
    assert losses[-1] < losses[0] - 0.05
    assert (logits(model, anchors) - before).abs().max() <= 1e-6
    assert 0.1 < guard.metrics()["safety/removed_fraction"] < 1
    assert guard.metrics()["safety/step_ms"] > 0


def test_step_is_adamws_without_its_projection(model: nn.Module) -> None:
    subspace = InputSubspace.measure(model, few_anchors(), energy=0.8, rank=3)
    batch = torch.randint(0, zoo.VOCABULARY, (4, 10))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    zoo.take_training_step(model, plain, batch)
    step = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    subspace.remove_(step)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    guard = PassportGuard(model, subspace.pieces())
    guarded = safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, guard=guard)
    zoo.take_training_step(model, guarded, batch)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), start[name] + step[name], atol=1e-9, rtol=0)


def lora(model: nn.Module, **changes: Any) -> nn.Module:
    options: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}
    adapted: nn.Module = get_peft_model(model, LoraConfig(**{**options, **changes}))  # type: ignore[arg-type]
    return adapted.double()


def test_lora_leaves_the_anchors_where_they_were(model: nn.Module) -> None:
    anchors = few_anchors()
    pieces = InputSubspace.measure(model, anchors, energy=1.0).pieces()
    before = logits(model, anchors)
    adapted = lora(model)
    guard = PassportGuard(adapted, pieces)
    torch.testing.assert_close(logits(adapted, anchors), before)
    losses = train(adapted, guard)
    assert losses[-1] < losses[0]
    assert (logits(adapted, anchors) - before).abs().max() <= 1e-6
    names = {name.split(".")[-3] for name in guard.pieces}
    assert names == {"lora_A"}


def test_a_head_that_trains_beside_an_adapter(tmp_path: Path) -> None:
    model, anchors = zoo.llama().eval(), few_anchors()
    file = tmp_path / "passport.safetensors"
    Passport.measure(model, anchors, held_out=0.0, energy=1.0).save(file)
    before = logits(model, anchors)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    guard = PassportGuard.from_passport(adapted, file)
    assert any("lm_head.modules_to_save" in name for name in guard.pieces)
    losses = train(adapted, guard)
    assert losses[-1] < losses[0]
    assert (logits(adapted, anchors) - before).abs().max() <= 1e-3  # the file's bases are rounded
    with torch.no_grad():
        adapted.get_output_embeddings().original_module.weight[0, 0] += 1
    with pytest.raises(PassportError, match=r"other weights in 'lm_head\.weight'"):
        PassportGuard.from_passport(adapted, file)


def test_lora_without_the_guard_moves_the_anchors(model: nn.Module) -> None:
    anchors = few_anchors()
    before = logits(model, anchors)
    adapted = lora(model)
    train(adapted, PassportGuard(adapted, {}, uncovered="ignore"))
    assert (logits(adapted, anchors) - before).abs().max() > 1e-3


def test_trained_adapter_is_refused_and_untouched() -> None:
    model = zoo.llama().double()
    pieces = InputSubspace.measure(model, few_anchors()).pieces()
    adapted = lora(model)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    with pytest.raises(ValueError, match=r"lora_A.*trained without this passport"):
        PassportGuard(adapted, pieces)
    assert all(torch.equal(before[name], p) for name, p in adapted.named_parameters())


def test_resumed_adapter_is_accepted() -> None:
    model = zoo.llama().double()
    pieces = InputSubspace.measure(model, few_anchors()).pieces()
    adapted = lora(model)
    train(adapted, PassportGuard(adapted, pieces))
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    PassportGuard(adapted, pieces)
    for name, p in adapted.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], atol=1e-12, rtol=0)


def test_adapted_embedding_is_refused() -> None:
    model = zoo.llama()
    pieces = InputSubspace.measure(model, few_anchors()).pieces()
    adapted = lora(model.float(), target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match="lora_embedding"):
        PassportGuard(adapted, pieces)


def test_unknown_parameters_are_named_ignored_or_frozen() -> None:
    model = zoo.llama()
    pieces = dict(InputSubspace.measure(model, few_anchors(), hold_small=False).pieces())
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*uncovered='freeze'"):
        PassportGuard(model, pieces)
    with pytest.raises(ValueError, match="uncovered must be one of"):
        PassportGuard(model, pieces, uncovered="Freeze")  # type: ignore[arg-type]
    PassportGuard(model, pieces, uncovered="ignore")
    assert all(p.requires_grad for p in model.parameters())
    PassportGuard(model, pieces, uncovered="freeze")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "norm" in n)


def test_bfloat16_weights_keep_what_rounding_allows() -> None:
    model = zoo.llama(hidden_size=64)
    anchors = few_anchors()
    subspace = InputSubspace.measure(model, anchors, energy=0.9)
    model.bfloat16()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, PassportGuard(model, subspace.pieces()))
    name = "model.layers.0.mlp.gate_proj.weight"
    moved = (dict(model.named_parameters())[name].detach() - start[name]).float()
    basis = subspace.bases[subspace.reads[name][0]]
    assert float((moved @ basis).norm()) < 0.05 * float(moved.norm())


def test_checkpoint_of_another_passport_is_refused() -> None:
    model = zoo.llama()
    pieces = InputSubspace.measure(model, few_anchors()).pieces()
    guard = PassportGuard(model, pieces, digest="abc")
    guard.load_state_dict(guard.state_dict())
    with pytest.raises(ValueError, match="a Guard with anchors made it"):
        guard.load_state_dict({"calibration": {}})
    with pytest.raises(ValueError, match=r"passport abc.*holds xyz"):
        PassportGuard(model, pieces, digest="xyz").load_state_dict(guard.state_dict())
