"""Small real architectures and random anchors that the core tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import safeopt
from safeopt.geometry import DenseSubspace
from safeopt.geometry.capture import logits_of
from safeopt.isolation import undisturbed
from safeopt.losses import reply_nll

VOCABULARY = 97


def llama(**changes: Any) -> nn.Module:
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes}))


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def lora_llama(**changes: Any) -> nn.Module:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", **changes))
    with torch.no_grad():  # away from initialisation, where every lora_A has zero gradient
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return model


def dora_llama() -> nn.Module:
    return lora_llama(use_dora=True)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied-llama": tied_llama,
    "gpt2": gpt2,
    "lora-llama": lora_llama,
    "dora-llama": dora_llama,
}


def random_anchors(count: int = 5, shortest: int = 6, longest: int = 14) -> safeopt.Anchors:
    lengths = torch.randint(shortest, longest, (count,)).tolist()
    ids = [torch.randint(0, VOCABULARY, (length,)).tolist() for length in lengths]
    labels = [[-100] * 3 + row[3:] for row in ids]
    return safeopt.Anchors.from_tokens(ids, labels)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def per_example_gradients(model: nn.Module, anchors: safeopt.Anchors) -> DenseSubspace:
    """The truth: one autograd call per anchor."""
    parameters = trainable(model)
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(len(anchors)):
        batch = anchors.batch([i])
        with undisturbed(model):
            loss = reply_nll(logits_of(model, batch), batch.labels).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            rows[name].append(gradient.double())
    return DenseSubspace({name: torch.stack(g) for name, g in rows.items()})


def random_step(model: nn.Module, scale: float = 1e-3) -> dict[str, Tensor]:
    return {name: scale * torch.randn_like(p) for name, p in trainable(model).items()}


def relative_error(measured: Tensor, truth: Tensor) -> float:
    return float((measured.double() - truth.double()).norm() / truth.double().norm())


def take_training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor | None = None
) -> float:
    batch = torch.randint(0, VOCABULARY, (4, 10)) if batch is None else batch
    optimizer.zero_grad()
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def assert_equal_nested(before: Any, after: Any) -> None:
    """Dicts and tuples of tensors and plain values are equal, to the bit and in dtype."""
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_equal_nested(before[key], after[key])
    elif isinstance(before, tuple):
        for one, other in zip(before, after, strict=True):
            assert_equal_nested(one, other)
    elif isinstance(before, torch.Tensor):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
    else:
        assert before == after
