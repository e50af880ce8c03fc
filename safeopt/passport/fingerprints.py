"""Digests of models, tokenizers and tensors: enough to tell whether two are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.distributed import is_dtensor
from safeopt.geometry.adapters import base_name

_SHORT = 16  # hex digits of a parameter's own digest
_ADAPTING = (".lora_", ".modules_to_save.")  # in the names of what PEFT adds


def tensor_bytes(tensor: Tensor) -> Any:
    """The tensor's bytes, on the host, without a further copy."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def weight_digests(model: nn.Module) -> dict[str, str]:
    """Shape and short digest of every parameter, by its name in the base model.

    Weights are digested as bfloat16, so that one checkpoint has one digest whether it is loaded
    in fp32 or in bf16; smaller differences are not noticed. LoRA adapters are left out, and so are
    the copies that train under PEFT's ``modules_to_save``: it keeps the original beside them.
    """
    digests = {}
    for name, p in model.named_parameters():
        if not any(part in name for part in _ADAPTING):
            whole: Any = p.detach()
            whole = whole.full_tensor() if is_dtensor(p) else whole
            short = hashlib.sha256(tensor_bytes(whole.to(torch.bfloat16))).hexdigest()[:_SHORT]
            digests[base_name(name)] = f"{'x'.join(map(str, p.shape))} {short}"
    return dict(sorted(digests.items()))


def tokenizer_digests(tokenizer: Any) -> dict[str, str]:
    """Digests of a tokenizer's vocabulary and of its chat template."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    template = getattr(tokenizer, "chat_template", None)
    return {
        "vocabulary": _text_digest(vocabulary),
        "chat_template": _text_digest(json.dumps(template, sort_keys=True)),
    }


def tensors_digest(tensors: Mapping[str, Tensor], parts: Iterable[str]) -> str:
    """Digest of some text and of named tensors: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
