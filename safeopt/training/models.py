"""Load the model and tokenizer that a config names, and wrap them in LoRA where it asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from safeopt.training.config import TrainConfig, from_mapping


def load_named(name: str, adapter: Path | None = None, dtype: str = "float32") -> tuple[Any, Any]:
    """A model by folder or hub id, with an adapter merged in, and its tokenizer.

    Raises:
        ValueError: The model or the adapter cannot be loaded, or there is no such type.
    """
    options = {
        "output_dir": ".",
        "model_name_or_path": name,
        "adapter_name_or_path": None if adapter is None else str(adapter),
        "dtype": dtype,
    }
    config = from_mapping(options, source="command line")
    return load_model(config), load_tokenizer(config)


def load_model(config: TrainConfig) -> Any:
    """The causal language model of ``config``, with ``adapter_name_or_path`` merged in.

    Raises:
        ValueError: No model is named, or it cannot be loaded.
    """
    name = _named(config)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, config.dtype))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {name!r}: {error}") from error
    if config.adapter_name_or_path is not None:
        model = merge_adapter(model, config.adapter_name_or_path)
    return model


def load_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer that belongs to the model of ``config``."""
    return AutoTokenizer.from_pretrained(_named(config))


def _named(config: TrainConfig) -> str:
    if config.model_name_or_path is None:
        raise ValueError("set model_name_or_path, or pass model and tokenizer to train()")
    return config.model_name_or_path


def merge_adapter(model: nn.Module, adapter: str | Path) -> Any:
    """Fold a PEFT adapter into the weights of ``model``.

    Raises:
        ValueError: The folder holds no adapter.
    """
    from peft import PeftModel

    if not (Path(adapter) / "adapter_config.json").exists():
        raise ValueError(f"{adapter} holds no PEFT adapter (no adapter_config.json)")
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    # PEFT froze the base weights to train the adapter alone; merged, they are the model.
    return merged.requires_grad_(True)


def add_lora(model: nn.Module, config: TrainConfig) -> Any:
    """``model`` with a fresh LoRA adapter; only the adapter trains."""
    from peft import LoraConfig, TaskType, get_peft_model

    targets: Any = list(config.lora_target_modules)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=config.model_name_or_path,
    )
    return get_peft_model(model, lora)


def prepare_for_training(model: nn.Module, config: TrainConfig) -> Any:
    """Apply LoRA and gradient checkpointing as ``config`` asks.

    Raises:
        ValueError: No parameter would train.
    """
    wrapped: Any = add_lora(model, config) if config.use_peft else model
    if config.gradient_checkpointing:
        # Reentrant checkpointing forbids autograd.grad, which the guard's refresh needs.
        wrapped.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    if not any(parameter.requires_grad for parameter in wrapped.parameters()):
        raise ValueError(
            "no parameter of the model trains: set requires_grad on some, or use_peft=True"
        )
    return wrapped


@contextmanager
def checkpointing_undone(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Undo afterwards the gradient checkpointing of `prepare_for_training`."""
    prepared: Any = model
    try:
        yield
    finally:
        if config.gradient_checkpointing:
            prepared.gradient_checkpointing_disable()
