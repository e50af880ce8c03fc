r"""What measuring costs: `safeopt measure` on SmolLM2-135M, and measuring by model size and N.

    python -m benchmarks.overhead.passport --part smollm2 \
        --output benchmarks/overhead/results/passport-smollm2-cpu.json
    python -m benchmarks.overhead.passport --part growth --threads 1 \
        --output benchmarks/overhead/results/passport-growth-cpu.json

``smollm2`` saves the demo's aligned model and its anchors and times the command as a user runs it,
in a process of its own, loading included. ``growth`` measures random Llamas: what measuring costs
does not depend on the numbers in the weights.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.overhead.memory import FP32, LLAMA_3_1_8B
from benchmarks.overhead.workload import ADAPTER, anchor_rows, peak_mb_of, seconds
from safeopt import Anchors, GradientSketch
from safeopt.demo.worker import load_aligned
from safeopt.environment import environment
from safeopt.files import write_json, write_jsonl
from safeopt.geometry.capture import logits_of
from safeopt.geometry.coverage import find_coverage
from safeopt.geometry.inputs import LARGEST_RANK
from safeopt.losses import reply_nll
from safeopt.passport import Passport
from safeopt.passport.report import Kind, kinds

CPU = torch.device("cpu")
STORED = 2  # bytes of an fp16 number in the file
PARAMETERS_8B = 8_030_261_248


@dataclass(frozen=True)
class Case:
    """A random Llama and the anchors that are measured on it."""

    hidden: int
    layers: int
    anchors: int
    tokens: int = 32
    repeats: int = 2


SIZES = (Case(128, 4, 16), Case(256, 4, 16), Case(512, 4, 16), Case(768, 4, 16))
NUMBERS = (Case(256, 4, 4), Case(256, 4, 64), Case(256, 4, 256))


def measure_command(anchors: int, seed: int) -> dict[str, Any]:
    """Time ``safeopt measure`` on the demo's aligned model and look at the file."""
    model, tokenizer = load_aligned(ADAPTER)
    weights = sum(p.numel() for p in model.parameters()) * FP32
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "SmolLM2-135M-Instruct-aligned")
        tokenizer.save_pretrained(folder / "SmolLM2-135M-Instruct-aligned")
        write_jsonl(folder / "anchors.jsonl", anchor_rows(anchors, seed))
        del model
        out = folder / "model.passport.safetensors"
        options = ["--model", str(folder / "SmolLM2-135M-Instruct-aligned")]
        options += ["--anchors", str(folder / "anchors.jsonl"), "--out", str(out)]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-m", "safeopt", "measure", *options]
        taken = seconds(lambda: subprocess.run(command, check=True, env=os.environ | threads), CPU)
        passport, size = Passport.load(out), out.stat().st_size
    found = kinds(passport)
    return {
        "anchors": anchors,
        "seconds": taken,
        "file_bytes": size,
        "fp32_weight_bytes": weights,
        "share_of_fp32_weights": size / weights,
        "certificate": passport.header["certificate"],
        "ranks": {k.name: {"width": max(k.widths), "ranks": list(k.ranks)} for k in found},
        "llama_3_1_8b_from_shapes": {
            "same ranks as SmolLM2-135M": _at_8b(_means(found)),
            f"every basis at the limit of {LARGEST_RANK}": _at_8b(
                dict.fromkeys(_means(found), LARGEST_RANK)
            ),
            "same share of the width as SmolLM2-135M, without the limit": _at_8b(
                {
                    k.name: statistics.fmean(k.ranks) / max(k.widths) * _width_8b(k.name)
                    for k in found
                }
            ),
        },
    }


def _means(found: Sequence[Kind]) -> dict[str, float]:
    return {kind.name: statistics.fmean(kind.ranks) for kind in found}


def _width_8b(kind: str) -> int:
    inner, hidden = LLAMA_3_1_8B.intermediate_size, LLAMA_3_1_8B.hidden_size
    return int((inner if kind.endswith("down_proj") else hidden) or 0)


def _at_8b(ranks: Mapping[str, float]) -> dict[str, float]:
    """Bytes of the bases at Llama-3.1-8B's widths and number of layers, ranks by kind."""
    layers = int(LLAMA_3_1_8B.num_hidden_layers or 0)
    total = sum(
        STORED * rank * _width_8b(kind) * (1 if kind == "lm_head" else layers)
        for kind, rank in ranks.items()
    )
    return {"file_bytes": total, "share_of_fp32_weights": total / (FP32 * PARAMETERS_8B)}


def build(case: Case) -> tuple[nn.Module, Anchors]:
    """A random Llama and random anchors of one length, half of it the reply."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=case.hidden,
        intermediate_size=8 * case.hidden // 3,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=case.hidden // 64,
    )
    ids = torch.randint(0, 8192, (case.anchors, case.tokens))
    labels = ids.clone()
    labels[:, : case.tokens // 2] = -100
    return LlamaForCausalLM(config), Anchors.from_tokens(list(ids), list(labels))


def measure_case(case: Case) -> dict[str, Any]:
    """CPU seconds and moment's memory of a passport and of a sketch, beside plain passes."""
    model, anchors = build(case)
    coverage, chunk = find_coverage(model), anchors.batch(range(min(8, len(anchors))))

    def forward() -> None:
        with torch.no_grad():
            for start in range(0, len(anchors), 8):
                logits_of(model, anchors.batch(range(start, min(start + 8, len(anchors)))))

    work = {
        "forward": forward,
        "passport": lambda: Passport.measure(model, anchors),
        "sketch_of_8": lambda: GradientSketch.measure(model, coverage, chunk, reply_nll),
    }
    peaks = {name: peak_mb_of(run) for name, run in work.items()}
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(case.repeats):
        for name, run in work.items():
            times[name].append(_cpu_seconds(run))
    pairs = zip(times["passport"], times["forward"], strict=True)
    return {
        **asdict(case),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_mb": sum(p.numel() for p in model.parameters()) * FP32 / 2**20,
        "cpu_seconds": times,
        "median_s": {name: statistics.median(values) for name, values in times.items()},
        "passport_over_forward": statistics.median(a / b for a, b in pairs),
        "peak_mb": peaks,
    }


def _cpu_seconds(work: Callable[[], object]) -> float:
    """The process's own time: one thread of a busy machine counts what it would alone."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main(argv: Sequence[str]) -> int:
    """Parse the command line, measure, write the result file."""
    parser = argparse.ArgumentParser(description="Measure what measuring costs.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--anchors", type=int, default=128, help="of --part smollm2")
    parser.add_argument("--part", choices=["smollm2", "growth"], required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    command = f"python -m benchmarks.overhead.passport {' '.join(argv)}"
    result: dict[str, Any] = {"command": command, "environment": environment()}
    if args.part == "smollm2":
        result |= measure_command(args.anchors, seed=0)
    else:
        result["rows"] = []
        for case in (*SIZES, *NUMBERS):
            result["rows"].append(measure_case(case))
            write_json(args.output, result)
    write_json(args.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
