"""Bytes of a gradient sketch, computed from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from safeopt.geometry.coverage import Site, find_coverage

FP32, BF16, INT64 = 4, 2, 8

LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)


@dataclass(frozen=True)
class SketchMemory:
    """Bytes of a sketch beside the bytes of the weights that it guards."""

    anchors: int
    tokens: int
    compression_rank: int | None
    sketch_bytes: int
    fp32_weight_bytes: int

    @property
    def share_of_fp32_weights(self) -> float:
        """Sketch bytes over fp32 weight bytes."""
        return self.sketch_bytes / self.fp32_weight_bytes

    @property
    def share_of_bf16_weights(self) -> float:
        """Sketch bytes over bf16 weight bytes; the sketch itself stays fp32."""
        return self.share_of_fp32_weights * FP32 / BF16


def llama_3_1_8b() -> nn.Module:
    """Llama-3.1-8B's shapes on the meta device: no weights, no memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(LLAMA_3_1_8B)


def from_shapes(
    model: nn.Module, anchors: int, tokens: int, compression_rank: int | None
) -> SketchMemory:
    """Compute what `GradientSketch.nbytes` will be.

    Args:
        model: the model; the meta device will do.
        anchors: N, anchors per refresh.
        tokens: T, length of the padded anchor batch.
        compression_rank: q; None keeps the T token factors.
    """
    rank = tokens if compression_rank is None else min(compression_rank, tokens)
    total = sum(_site_bytes(site, anchors, tokens, rank) for site in find_coverage(model).sites)
    weights = sum(p.numel() for p in model.parameters()) * FP32
    return SketchMemory(anchors, tokens, compression_rank, total, weights)


def _site_bytes(site: Site, anchors: int, tokens: int, rank: int) -> int:
    shapes = {local: getattr(site.module, local).shape for local in site.parameters}
    if site.rule == "embedding":
        return anchors * tokens * (INT64 + FP32 * int(shapes["weight"][1]))
    if site.rule == "small":
        return sum(anchors * FP32 * shape.numel() for shape in shapes.values())
    matrix = rank * sum(shapes["weight"]) if "weight" in shapes else 0
    bias = shapes["bias"].numel() if "bias" in shapes else 0
    return anchors * FP32 * (matrix + bias)
