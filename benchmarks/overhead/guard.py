"""What a guard costs: time between refreshes, time of a refresh, memory, and compression error.

    python -m benchmarks.overhead.guard --output benchmarks/overhead/results/smollm2-cpu.json

Everything that is compared is measured in one run on one model, in turns; figures are medians and
ratios are taken within a repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.overhead import compression, memory
from benchmarks.overhead.workload import Workload, load, seconds
from safeopt import Guard, SafeAdamW
from safeopt.environment import environment
from safeopt.files import write_json

NEVER = 10**9
TOKENS_OF_LONG_ANCHORS = 512


@dataclass(frozen=True)
class Settings:
    """Sizes of the workload; the guard keeps its defaults unless named here."""

    device: str = "cpu"
    rows: int = 4
    tokens: int = 160
    anchors: int = 8
    lr: float = 2e-5
    repeats: int = 9
    seed: int = 0


@dataclass
class Times:
    """Seconds per repeat."""

    forward_backward: list[float] = field(default_factory=list)
    adamw_step: list[float] = field(default_factory=list)
    fused_adamw_step: list[float] = field(default_factory=list)
    safe_adamw_step: list[float] = field(default_factory=list)
    anchor_forward_backward: list[float] = field(default_factory=list)
    refresh: list[float] = field(default_factory=list)

    def summary(self, refresh_every: int) -> dict[str, float]:
        """Medians in seconds, and medians of the ratios within a repeat."""
        medians = {f"{name}_s": statistics.median(values) for name, values in asdict(self).items()}
        between = self._added_to(self.adamw_step)
        over_fused = self._added_to(self.fused_adamw_step)
        refresh = [
            mine / plain
            for mine, plain in zip(self.refresh, self.anchor_forward_backward, strict=True)
        ]
        training_step = medians["forward_backward_s"] + medians["adamw_step_s"]
        added = medians["safe_adamw_step_s"] - medians["adamw_step_s"]
        added += medians["refresh_s"] / refresh_every
        return medians | {
            "overhead_between_refreshes": statistics.median(between),
            "overhead_between_refreshes_worst": max(between),
            "overhead_between_refreshes_over_fused": statistics.median(over_fused),
            "refresh_over_anchor_forward_backward": statistics.median(refresh),
            "refresh_over_anchor_forward_backward_worst": max(refresh),
            "overhead_with_refreshes": added / training_step,
        }

    def _added_to(self, plain_step: list[float]) -> list[float]:
        """What the guard adds to a training step, as a share of the unguarded one."""
        turns = zip(self.forward_backward, plain_step, self.safe_adamw_step, strict=True)
        return [(safe - plain) / (work + plain) for work, plain, safe in turns]


def measure_times(workload: Workload, guard: Guard, settings: Settings) -> Times:
    """Time AdamW and SafeAdamW on the same gradients in alternating order.

    The guard must not be due: its refreshes are timed by themselves, beside an ordinary
    forward-backward of the same anchors.
    """
    device = torch.device(settings.device)
    model = workload.model
    plain = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    fused = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
    safe = SafeAdamW(model.named_parameters(), lr=settings.lr, weight_decay=0.0, guard=guard)
    times = Times()
    for repeat in range(settings.repeats + 1):
        turn = Times()
        turn.refresh.append(seconds(guard.refresh, device))
        turn.anchor_forward_backward.append(seconds(workload.anchor_forward_backward, device))
        turn.forward_backward.append(seconds(workload.train_forward_backward, device))
        safe.step()  # the step after a refresh may carry a retraction: not the one that is timed
        timed: list[tuple[list[float], torch.optim.Optimizer]] = [
            (turn.adamw_step, plain),
            (turn.fused_adamw_step, fused),
            (turn.safe_adamw_step, safe),
        ]
        for record, optimizer in timed if repeat % 2 else reversed(timed):
            record.append(seconds(optimizer.step, device))
        if repeat:  # the first turn warms up
            for name, values in asdict(turn).items():
                getattr(times, name).extend(values)
    model.zero_grad(set_to_none=True)
    return times


def measure_memory(workload: Workload, guard: Guard, settings: Settings) -> dict[str, Any]:
    """Bytes of the guard's sketch on this model, and from shapes at Llama-3.1-8B.

    Raises:
        RuntimeError: the bytes held differ from those computed from shapes.
    """
    assert guard.sketch is not None
    tokens = workload.anchors.batch().input_ids.shape[1]
    here = memory.from_shapes(workload.model, settings.anchors, tokens, guard.compression_rank)
    if here.sketch_bytes != guard.sketch.nbytes:
        raise RuntimeError(
            f"computed {here.sketch_bytes} bytes, the sketch holds {guard.sketch.nbytes}: "
            "benchmarks/overhead/memory.py no longer follows GradientSketch"
        )
    large = memory.from_shapes(
        memory.llama_3_1_8b(), settings.anchors, TOKENS_OF_LONG_ANCHORS, guard.compression_rank
    )
    return {
        name: asdict(m)
        | {
            "share_of_fp32_weights": m.share_of_fp32_weights,
            "share_of_bf16_weights": m.share_of_bf16_weights,
        }
        for name, m in {"measured": here, "llama_3_1_8b_from_shapes": large}.items()
    }


def measure(workload: Workload, settings: Settings) -> dict[str, Any]:
    """Measure everything on a workload; plain values, ready for JSON."""
    defaults = Guard(workload.model, workload.anchors, anchors_per_refresh=settings.anchors)
    errors = compression.measure(workload, settings.lr, defaults.eigenvalue_floor)
    guard = Guard(
        workload.model,
        workload.anchors,
        anchors_per_refresh=settings.anchors,
        refresh_every=NEVER,
        seed=settings.seed,
    )
    times = measure_times(workload, guard, settings)
    return {
        "settings": asdict(settings),
        "environment": environment(),
        "guard": {"refresh_every": defaults.refresh_every, "rank": len(guard.spectrum())},
        "summary": times.summary(defaults.refresh_every),
        "memory": measure_memory(workload, guard, settings),
        "compression": [asdict(error) for error in errors],
        "seconds": asdict(times),
    }


def main(argv: Sequence[str]) -> int:
    """Parse the command line, measure, write the result file."""
    parser = argparse.ArgumentParser(description="Measure what a guard costs.")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = vars(parser.parse_args(argv))
    output = options.pop("output")
    result = {"command": f"python -m benchmarks.overhead.guard {' '.join(argv)}"}
    settings = Settings(**options)
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    workload = load(device, settings.rows, settings.tokens, settings.anchors, settings.seed)
    result |= measure(workload, settings)
    write_json(output, result)
    print(json.dumps(result["summary"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
