r"""How much of the guard's promise the stored weights keep, by their dtype and rounding.

    python -m benchmarks.overhead.leak --output benchmarks/overhead/results/leak-cpu.json

A guard takes the velocity into the safety subspace out of every step; what the weights can hold of
that depends on their dtype. A small Llama with random weights of the usual size trains on random
tokens under one exact sketch that is never refreshed, without retraction. The leak of a change d of
the stored weights is ‖Uᵀd‖/‖d‖, with U from a dense copy of the sketch: of each step, and of all
steps together (drift).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from safeopt import Anchors, DenseSubspace, Guard, SafeAdamW
from safeopt.environment import environment
from safeopt.files import write_json

NEVER = 10**9
VOCABULARY = 256
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and the run."""

    layers: int = 4
    width: int = 128
    anchors: int = 8
    rows: int = 8
    tokens: int = 32
    steps: int = 20
    rates: tuple[float, ...] = (1e-5, 1e-4)
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Variant:
    """How weights and moments are stored.

    Attributes:
        weights: dtype of the weights.
        rounding: as in `safeopt.SafeAdamW`.
        moments: dtype of the moments; None for that of the weights.
        guarded: False for AdamW alone.
    """

    weights: torch.dtype
    rounding: Any = "nearest"
    moments: torch.dtype | None = FP32
    guarded: bool = True


VARIANTS = {
    "fp32, AdamW without a guard": Variant(FP32, moments=None, guarded=False),
    "fp32": Variant(FP32, moments=None),
    "bf16, as AdamW stores it": Variant(BF16, moments=None),
    "bf16, fp32 moments": Variant(BF16),
    "bf16, fp32 moments, stochastic rounding": Variant(BF16, "stochastic"),
    "bf16, fp32 moments, Kahan": Variant(BF16, "kahan"),
    "fp16, fp32 moments": Variant(FP16),
    "fp16, fp32 moments, Kahan": Variant(FP16, "kahan"),
}


@dataclass(frozen=True)
class Leaks:
    """What one run shows.

    Attributes:
        step: median leak of a step.
        drift: leak of the change since the start.
        moved: median share of the weights that a step changes.
        chance: leak of a random direction, sqrt(k / P).
    """

    step: float
    drift: float
    moved: float
    chance: float


def measure(variant: Variant, lr: float, seed: int, settings: Settings) -> Leaks:
    """Train one model and look at what was stored, step by step."""
    torch.manual_seed(seed)
    model = _model(settings).to(variant.weights)
    guard = _guard(model, settings)
    optimizer = SafeAdamW(
        model.named_parameters(),
        lr=lr,
        rounding=variant.rounding,
        moments_dtype=variant.moments,
        seed=seed,
        guard=guard if variant.guarded else None,
    )
    guard.refresh()
    assert guard.sketch is not None
    shapes = {name: p.shape for name, p in model.named_parameters()}
    dense = DenseSubspace.from_sketch(guard.sketch, shapes)
    basis = dense.basis()
    start = before = _stored(model)
    leaks, moved = [], []
    for _ in range(settings.steps):
        batch = torch.randint(0, VOCABULARY, (settings.rows, settings.tokens))
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        now = _stored(model)
        change = _difference(now, before)
        leaks.append(dense.leak(change, basis))
        moved.append(_share_moved(change))
        before = now
    elements = sum(shape.numel() for shape in shapes.values())
    return Leaks(
        step=statistics.median(leaks),
        drift=dense.leak(_difference(before, start), basis),
        moved=statistics.median(moved),
        chance=(basis.shape[1] / elements) ** 0.5,
    )


def _model(settings: Settings) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=settings.tokens,
    )
    return LlamaForCausalLM(config)


def _guard(model: Any, settings: Settings) -> Guard:
    ids = torch.randint(0, VOCABULARY, (settings.anchors, settings.tokens // 2)).tolist()
    labels = [[-100] * 4 + row[4:] for row in ids]
    return Guard(
        model,
        Anchors.from_tokens(ids, labels),
        anchors_per_refresh=settings.anchors,
        compression_rank=None,
        refresh_every=NEVER,
        retraction=False,
        step_limit=None,
    )


def _stored(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def _difference(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value - before[name] for name, value in now.items()}


def _share_moved(change: Mapping[str, Tensor]) -> float:
    moved = sum(int(delta.count_nonzero()) for delta in change.values())
    return moved / sum(delta.numel() for delta in change.values())


def measure_all(settings: Settings) -> list[dict[str, Any]]:
    """Every variant at every learning rate, seed by seed."""
    return [
        {
            "variant": name,
            "lr": lr,
            "runs": [asdict(measure(variant, lr, seed, settings)) for seed in settings.seeds],
        }
        for name, variant in VARIANTS.items()
        for lr in settings.rates
    ]


def main(argv: Sequence[str]) -> int:
    """Parse the command line, measure, write the result file."""
    parser = argparse.ArgumentParser(description="Measure the leak of the stored weights.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    settings = Settings()
    result = {
        "command": f"python -m benchmarks.overhead.leak --output {args.output}",
        "environment": environment(),
        "settings": asdict(settings),
        "rows": measure_all(settings),
    }
    write_json(args.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
