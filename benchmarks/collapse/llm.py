"""The paper's two models and its benign sets, for a GPU: the ``qwen3`` and ``llama32`` suites.

Springer et al. (arXiv 2602.15799) fine-tune Qwen3-1.7B and Llama-3.2-3B-Instruct on SamSum, Alpaca,
Dolly, GSM8K, Orca-Math and WikiText (their seventh set, DriftCheck, is not public). Both models are
aligned by their makers, so nothing is merged in: anchors are their own refusals.
"""

from __future__ import annotations

from benchmarks.collapse.chat import Chat, ChatConfig
from benchmarks.collapse.suite import RunSettings

TASKS = ("gsm8k", "alpaca", "dolly", "samsum", "orca_math", "wikitext")


class Llm(Chat):
    """What both suites share: 300 steps of 16 rows, in bf16 autocast on a GPU."""

    tasks = TASKS
    settings = RunSettings(
        steps=300, lr=2e-5, batch_size=16, evaluate_every=300, warmup_steps=15, log_every=10
    )


class Qwen3(Llm):
    """Qwen3-1.7B."""

    name = "qwen3"

    @staticmethod
    def usual() -> ChatConfig:
        """The published chat model."""
        return gpu("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base")


class Llama32(Llm):
    """Llama-3.2-3B-Instruct."""

    name = "llama32"

    @staticmethod
    def usual() -> ChatConfig:
        """The published chat model."""
        return gpu("meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B")


def gpu(model: str, base: str) -> ChatConfig:
    """A published model on one GPU, with longer rows and replies than SmolLM2's."""
    return ChatConfig(
        model=model,
        base=base,
        device="cuda",
        task_test_rows=200,
        max_length=512,
        reply_tokens=64,
    )
