"""Greedy replies to chat prompts, batched by length, leaving the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from safeopt.isolation import undisturbed


@dataclass(frozen=True)
class Decoding:
    """How replies are decoded; decoding is always greedy.

    Attributes:
        max_new_tokens: Tokens of a reply at most. 24 are enough to see a refusal.
        batch_size: Prompts decoded together.
        dtype: Decode from a copy of the weights in this type, for example ``"bfloat16"``, which
            is many times faster on CPUs with bf16 instructions; ``None`` decodes as it is.
    """

    max_new_tokens: int = 24
    batch_size: int = 48
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError("max_new_tokens and batch_size must be at least 1")
        if self.dtype is not None and not isinstance(getattr(torch, self.dtype, 0), torch.dtype):
            raise ValueError(f"dtype must name a torch type such as 'bfloat16'; got {self.dtype!r}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode without gradients; leave modes, buffers and RNGs as they were."""
    with undisturbed(model), torch.no_grad():
        yield


def greedy_replies(
    model: Any, tokenizer: Any, prompts: Sequence[str], decoding: Decoding | None = None
) -> list[str]:
    """Answer each prompt as one user turn of the tokenizer's chat template.

    Prompts are sorted by length, so that a batch holds little padding, and padded on the left.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer, with a chat template.
        prompts: User turns.
        decoding: Length and batch size; ``Decoding()`` by default.

    Returns:
        One reply a prompt, in the order of ``prompts``, special tokens removed.

    Raises:
        ValueError: The tokenizer has no chat template.
    """
    encoded = [_encode(prompt, tokenizer) for prompt in prompts]
    return greedy_continuations(model, tokenizer, encoded, decoding)


def greedy_continuations(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    decoding: Decoding | None = None,
) -> list[str]:
    """The same of prompts that are token ids, template included."""
    decoding = decoding or Decoding()
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    replies = [""] * len(encoded)
    with evaluating(model), _decoder(model, decoding.dtype) as model:
        for start in range(0, len(order), decoding.batch_size):
            batch = order[start : start + decoding.batch_size]
            texts = _decode(model, tokenizer, [encoded[i] for i in batch], decoding.max_new_tokens)
            for index, text in zip(batch, texts, strict=True):
                replies[index] = text
    return replies


@contextmanager
def _decoder(model: Any, dtype: str | None) -> Iterator[Any]:
    """What decodes: ``model``, or a copy in ``dtype``.

    The last hidden state that ``generate`` takes is a strided slice. With a frozen matrix
    `torch.nn.functional.linear` makes a batched product of it, for which a CPU copies the
    vocabulary's matrix once a prompt; so the slice is made contiguous before.
    """
    model = model if dtype is None else cast_copy(model, dtype)
    head = model.get_output_embeddings()
    if head is None:
        yield model
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield model
    finally:
        hook.remove()


def cast_copy(model: nn.Module, dtype: str) -> nn.Module:
    """A copy of ``model`` with its parameters in ``dtype``; buffers keep their type.

    Only the cast parameters are allocated: the original's are never duplicated.
    """
    target = getattr(torch, dtype)
    cast = {
        id(p): nn.Parameter(p.detach().to(target), requires_grad=False)
        for p in model.parameters()
        if p.dtype != target
    }
    return copy.deepcopy(model, memo=cast)


def _encode(prompt: str, tokenizer: Any) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _decode(model: Any, tokenizer: Any, rows: list[list[int]], max_new_tokens: int) -> list[str]:
    from transformers import GenerationConfig

    stop = model.generation_config.eos_token_id or tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # A fresh config: the model's own may carry sampling settings that greedy decoding warns about.
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=pad
    )
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
    )
    return [text.strip() for text in tokenizer.batch_decode(output[:, width:], True)]
