"""What the overhead benchmark runs on: SmolLM2-135M, a GSM8K batch and anchors from the demo."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import safeopt.demo
from safeopt import Anchors
from safeopt.demo import data
from safeopt.demo.worker import load_aligned
from safeopt.environment import peak_memory_mb, reset_peak_memory

ADAPTER = Path(safeopt.demo.__file__).parent / "adapter"


@dataclass(frozen=True)
class Workload:
    """A model, one training batch and anchors, on one device.

    Attributes:
        model: the model in fp32.
        batch: token ids, (rows, tokens), without padding.
        anchors: three refuse anchors for every comply anchor.
    """

    model: nn.Module
    batch: Tensor
    anchors: Anchors

    def forward_backward(self, input_ids: Tensor, labels: Tensor, **inputs: Tensor) -> None:
        """Clear the gradients and form them afresh, as a training step does."""
        self.model.zero_grad(set_to_none=True)
        self.model(input_ids=input_ids, labels=labels, **inputs).loss.backward()

    def train_forward_backward(self) -> None:
        """Forward and backward of the training batch."""
        self.forward_backward(self.batch, self.batch)

    def anchor_forward_backward(self) -> None:
        """Forward and backward of all anchors as one ordinary batch."""
        anchors = self.anchors.batch().to(self.batch.device)
        self.forward_backward(
            anchors.input_ids, anchors.labels, attention_mask=anchors.attention_mask
        )


def load(device: torch.device, rows: int, tokens: int, anchors: int, seed: int) -> Workload:
    """Load the demo's aligned SmolLM2-135M, GSM8K text as rows x tokens, and the anchors."""
    model, tokenizer = load_aligned(ADAPTER)
    text = "\n\n".join(f"{row['prompt']}\n{row['reply']}" for row in data.gsm8k())
    ids = torch.tensor(tokenizer(text).input_ids[: rows * tokens])
    return Workload(
        model=model.to(device).train(),
        batch=ids.view(rows, tokens).to(device),
        anchors=Anchors.from_rows(anchor_rows(anchors, seed), tokenizer),
    )


def anchor_rows(count: int, seed: int) -> list[data.AnchorRow]:
    """Three refuse rows for every comply row."""
    comply = [
        data.AnchorRow(prompt=pair.harmless, reply=pair.reply, kind="comply")
        for pair in data.refusal_pairs()[: count // 4]
    ]
    return data.refuse_rows(data.advbench().train[: count - len(comply)], seed) + comply


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds that ``work`` takes, the device's queue emptied on both sides."""
    _synchronise(device)
    start = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - start


def peak_mb_of(work: Callable[[], object]) -> float:
    """MiB that ``work`` takes for a moment beyond what it finds; the process's resident memory."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # else memory that earlier work has freed would be taken unseen
        trim(0)
    reset_peak_memory()
    before = peak_memory_mb()
    work()
    return peak_memory_mb() - before


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
