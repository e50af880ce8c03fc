"""Time a guarded step beside AdamW on the layers of three models.

    python -m benchmarks.kernels.run --device cuda --output benchmarks/kernels/results/run-h100.json
    python -m benchmarks.kernels.run --output benchmarks/kernels/results/run-cpu.json

On a GPU it prints milliseconds, GB/s and the share of the bandwidth that a plain copy reaches, and
says whether the kernels keep what was promised of them (exit code 1 if not). On a CPU it takes
smaller layers (``--shrink``), prints times as ratios to fused AdamW in paired repeats, and the
bytes that every provider moves at full size, which is what a GPU's time is made of.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.layers import MODELS, Model
from benchmarks.kernels.providers import Layer, Step, make_layer, providers
from safeopt.environment import environment
from safeopt.files import write_json
from safeopt_kernels import dispatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_OVER_FUSED = 1.35  # of the guarded step, at N q = 128
MOST_OF_A_STEP = 0.05  # of a training step of a 7B model, which takes 0.8 s on one H100
STEP_SECONDS, PARAMETERS_7B = 0.8, 6.74e9
OURS, PLAIN = "K1, steps in the weights", "K1 without factors"

Row = dict[str, Any]


def predicted(model: Model, dtype: str, count: int, rank: int) -> list[Row]:
    """Bytes per parameter of every provider at full size; nothing is computed."""
    layer = make_layer(model.layer(), count, rank, DTYPES[dtype], "meta")
    return [
        {
            "model": model.name,
            "dtype": dtype,
            "provider": provider.name,
            "bytes_per_parameter": provider.bytes(layer) / layer.parameters,
        }
        for provider in providers()
    ]


def on_gpu(model: Model, dtype: str, count: int, rank: int, shrink: int) -> list[Row]:
    """Milliseconds and GB/s of every provider; the caches are cold."""
    from triton.testing import do_bench

    shapes = model.layer(shrink)
    achievable = copy_bandwidth()
    rows = []
    for provider in providers():
        layer = make_layer(shapes, count, rank, DTYPES[dtype], "cuda")
        meta = make_layer(shapes, count, rank, DTYPES[dtype], "meta")
        ms = float(do_bench(provider.build(layer), return_mode="median"))
        moved = provider.bytes(meta)
        rows.append(
            {
                "model": model.name,
                "dtype": dtype,
                "provider": provider.name,
                "parameters": layer.parameters,
                "ms": ms,
                "GB/s": moved / ms / 1e6,
                "share_of_achievable": moved / ms / 1e6 / achievable,
            }
        )
    return rows


def copy_bandwidth(elements: int = 1 << 28) -> float:
    """GB/s of a plain copy: what this GPU's memory can be brought to give."""
    from triton.testing import do_bench

    source = torch.empty(elements, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    ms = float(do_bench(lambda: target.copy_(source), return_mode="median"))
    return 2 * source.numel() * source.element_size() / ms / 1e6


def on_cpu(model: Model, dtype: str, count: int, rank: int, shrink: int, repeats: int) -> list[Row]:
    """Time of every provider over that of the first, medians of paired repeats."""
    layers: list[tuple[str, Layer, Step]] = []
    for provider in providers():
        layer = make_layer(model.layer(shrink), count, rank, DTYPES[dtype], "cpu")
        layers.append((provider.name, layer, provider.build(layer)))
    times: dict[str, list[float]] = {name: [] for name, _, _ in layers}
    for repeat in range(repeats + 1):
        for name, _, step in layers:
            start = time.perf_counter()
            step()
            if repeat:  # the first turn compiles
                times[name].append(time.perf_counter() - start)
    first = next(iter(times.values()))
    return [
        {
            "model": model.name,
            "dtype": dtype,
            "provider": name,
            "parameters": layer.parameters,
            "over_fused": statistics.median(a / b for a, b in zip(times[name], first, strict=True)),
        }
        for name, layer, _ in layers
    ]


def promises(rows: Sequence[Row]) -> list[Row]:
    """What the kernels must show on a GPU, from measured rows of one model and dtype."""
    ms = {row["provider"]: row["ms"] for row in rows}
    # torch's fused AdamW keeps bf16 moments for bf16 weights, so there the same work is K1's first
    # pass without factors.
    base = "AdamW, fused" if rows[0]["dtype"] == "float32" else PLAIN
    ratio = ms[OURS] / ms[base]
    extra = (ms[OURS] - ms[base]) / rows[0]["parameters"] * PARAMETERS_7B / 1e3 / STEP_SECONDS
    facts = {"model": rows[0]["model"], "dtype": rows[0]["dtype"], "base": base}
    return [
        {**facts, "what": "guarded step over AdamW", "value": ratio, "most": MOST_OVER_FUSED},
        {**facts, "what": "share of a 7B training step", "value": extra, "most": MOST_OF_A_STEP},
    ]


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned columns."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str]) -> int:
    """Parse the command line, measure, print tables, write the result file."""
    parser = argparse.ArgumentParser(description="Time a guarded step beside AdamW.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="both on a GPU")
    parser.add_argument("--count", type=int, default=16, help="N, low-rank parts")
    parser.add_argument("--rank", type=int, default=8, help="q, rank of each")
    parser.add_argument("--shrink", type=int, help="divides every width; 8 on a CPU, 1 on a GPU")
    parser.add_argument("--repeats", type=int, default=7, help="on a CPU")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    result = measure(options)
    result = {
        "command": f"python -m benchmarks.kernels.run {' '.join(argv)}",
        "environment": environment(),
        "N": options.count,
        "q": options.rank,
        **result,
    }
    write_json(options.output, result)
    return int(any(promise["value"] > promise["most"] for promise in result["promises"]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print everything that goes into the result file."""
    size = options.count, options.rank
    gpu = options.device == "cuda"
    shrink = options.shrink or (1 if gpu else 8)
    dtypes = options.dtypes or (list(DTYPES) if gpu else ["float32"])
    measured: list[Row] = []
    kept: list[Row] = []
    for model in MODELS:
        for dtype in dtypes:
            if gpu:
                rows = on_gpu(model, dtype, *size, shrink)
                kept += promises(rows)
            else:
                rows = on_cpu(model, dtype, *size, shrink, options.repeats)
            print(table(rows), flush=True)
            measured += rows
    bytes_moved = [row for model in MODELS for d in DTYPES for row in predicted(model, d, *size)]
    for rows in (bytes_moved, kept):
        if rows:
            print(table(rows), flush=True)
    return {
        "kernels": dispatch.mode(),
        "shrink": shrink,
        "measured": measured,
        "bytes": bytes_moved,
        "promises": kept,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
