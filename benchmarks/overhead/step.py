r"""What a guarded step costs beside AdamW's: time and memory, by parameters, N, q and k.

    python -m benchmarks.overhead.step --part sizes \
        --output benchmarks/overhead/results/step-sizes-cpu.json

Stacks of square matrices with random gradients and a random sketch of the right shapes: what a
step costs does not depend on the numbers. Refreshes are `benchmarks.overhead.guard`'s business.
All steps of one row run in turns on the same tensors; figures are medians, and ratios are taken
within a turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.overhead.workload import peak_mb_of, seconds
from safeopt import Anchors, GradientSketch, Guard, SafeAdamW
from safeopt.environment import environment
from safeopt.files import write_json
from safeopt.geometry.blocks import LowRankBlock

NEVER = 10**9
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One row of the table: the defaults are those of a guard.

    Attributes:
        layers: matrices in the stack.
        width: rows and columns of each.
        anchors: N.
        compression_rank: q.
        rank: k; None keeps all N.
        repeats: turns that count.
    """

    layers: int
    width: int
    anchors: int = 8
    compression_rank: int = 8
    rank: int | None = None
    repeats: int = 9

    @property
    def parameters(self) -> int:
        """Elements of all matrices."""
        return self.layers * self.width**2


SIZES = (Case(10, 1024), Case(24, 2048))
LARGE = (Case(30, 4096, repeats=3),)
MIDDLE = SIZES[1]
GROWTH = (
    MIDDLE,
    *(Case(MIDDLE.layers, MIDDLE.width, anchors=n) for n in (4, 16, 32)),
    *(Case(MIDDLE.layers, MIDDLE.width, compression_rank=q) for q in (1, 4, 16)),
    *(Case(MIDDLE.layers, MIDDLE.width, rank=k) for k in (1, 4)),
)
PARTS = {"sizes": SIZES, "large": LARGE, "growth": GROWTH}
EMPTY = {
    "10 M parameters, fused": (10, 1024, 121, {"fused": True}),
    "10 M parameters, for-loop": (10, 1024, 121, {"foreach": False}),
    "10 M parameters, foreach": (10, 1024, 121, {"foreach": True}),
    "1 M parameters in 256 tensors, default": (256, 64, 301, {}),
}


class Stack(nn.Module):
    """Square matrices, and logits that do not pass through them: only the step is measured."""

    table: Tensor

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.register_buffer("table", torch.zeros(4, 4))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Constant logits, (N, T, 4)."""
        logits: Tensor = self.table[input_ids]
        return logits


def build(case: Case) -> tuple[Stack, Guard]:
    """A stack with random gradients and a guard that holds a random sketch and is not due."""
    model = Stack(case.layers, case.width)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    rows = [[0, 1, 2]] * case.anchors
    guard = Guard(
        model,
        Anchors.from_tokens(rows, rows),
        anchors_per_refresh=case.anchors,
        compression_rank=case.compression_rank,
        refresh_every=NEVER,
        rank=case.rank,
    )
    shape = (case.anchors, case.compression_rank, case.width)
    blocks = {
        name: (LowRankBlock(torch.randn(shape), torch.randn(shape)),)
        for name, _ in model.named_parameters()
    }
    sketch = GradientSketch(blocks, torch.zeros(case.anchors), torch.ones(case.anchors))
    frame = {
        "anchors": list(range(case.anchors)),
        "names": list(blocks),
        "sketch": sketch.state_dict(),
        "gram": sketch.gram(),
        "has_silence": False,
    }
    no_violation = torch.zeros(case.anchors, dtype=torch.float64)
    state = guard.state_dict() | {"frame": (frame,), "violation": (no_violation,), "age": 1}
    guard.load_state_dict(state)
    return model, guard


def measure_case(case: Case) -> dict[str, Any]:
    """Time and memory of AdamW's step, plain and fused, and of the guarded step."""
    model, guard = build(case)
    optimizer = SafeAdamW(model.named_parameters(), lr=1e-6, weight_decay=0.0)
    (group,) = optimizer.param_groups

    def step_as(held: Guard | None, fused: bool | None) -> Callable[[], None]:
        def step() -> None:
            optimizer.guard, group["fused"] = held, fused
            optimizer.step()

        return step

    steps = {
        "adamw": step_as(None, None),
        "fused_adamw": step_as(None, True),
        "guarded": step_as(guard, None),
    }
    peaks = {name: peak_mb_of(step) for name, step in steps.items() for _ in range(2)}
    times = _in_turns(steps, case.repeats)
    assert guard.sketch is not None
    return {
        **asdict(case),
        "parameters": case.parameters,
        "kept_directions": int(guard.metrics()["safety/rank"]),
        "seconds": times,
        "median_s": {name: statistics.median(values) for name, values in times.items()},
        "guarded_over_adamw": _ratio(times["guarded"], times["adamw"]),
        "guarded_over_fused": _ratio(times["guarded"], times["fused_adamw"]),
        "peak_mb": peaks,
        "weights_mb": case.parameters * 4 / 2**20,
        "sketch_mb": guard.sketch.nbytes / 2**20,
    }


def measure_empty(layers: int, width: int, repeats: int, options: dict[str, Any]) -> dict[str, Any]:
    """SafeAdamW without a guard beside torch.optim.AdamW, on the same tensors."""
    model = Stack(layers, width)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    rest: dict[str, Any] = {"lr": 1e-6, **options}
    steps: dict[str, Callable[[], Any]] = {
        "adamw": torch.optim.AdamW(model.parameters(), **rest).step,
        "safe_adamw": SafeAdamW(model.parameters(), **rest).step,
    }
    times = _in_turns(steps, repeats)
    return {
        "seconds": times,
        "median_s": {name: statistics.median(values) for name, values in times.items()},
        "safe_over_adamw": _ratio(times["safe_adamw"], times["adamw"]),
    }


def _in_turns(steps: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every step in every turn; the order turns round, the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        order = list(steps) if turn % 2 else list(reversed(steps))
        for name in order:
            taken = seconds(steps[name], CPU)
            if turn:
                times[name].append(taken)
    return times


def _ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def main(argv: Sequence[str]) -> int:
    """Parse the command line, measure, write the result file."""
    parser = argparse.ArgumentParser(description="Measure what a guarded step costs.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", choices=["empty", *PARTS], required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    command = f"python -m benchmarks.overhead.step --part {args.part} --output {args.output}"
    result: dict[str, Any] = {"command": command, "environment": environment()}
    if args.part == "empty":
        result["rows"] = {name: measure_empty(*case) for name, case in EMPTY.items()}
    else:
        result["rows"] = [measure_case(case) for case in PARTS[args.part]]
    write_json(args.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
