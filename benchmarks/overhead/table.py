"""Write the tables of this folder's README from one result file.

python -m benchmarks.overhead.table benchmarks/overhead/results/smollm2-cpu.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import fill
from safeopt.files import write_text

README = Path(__file__).parent / "README.md"
RESULTS = Path(__file__).parent / "results"

Facts = Mapping[str, Any]


def time_table(result: Facts) -> str:
    """Median seconds and ratios."""
    summary, p = result["summary"], result["guard"]["refresh_every"]
    rows = [
        ("forward-backward of the training batch", f"{summary['forward_backward_s']:.2f} s"),
        ("AdamW step", f"{summary['adamw_step_s']:.3f} s"),
        ("AdamW step, fused=True", f"{summary['fused_adamw_step_s']:.3f} s"),
        (
            "SafeAdamW step between refreshes (its AdamW is fused)",
            f"{summary['safe_adamw_step_s']:.3f} s",
        ),
        (
            "**added between refreshes, share of the AdamW training step**",
            _percent(summary["overhead_between_refreshes"]),
        ),
        (
            "the same with fused=True",
            _percent(summary["overhead_between_refreshes_over_fused"]),
        ),
        ("forward-backward of the anchors", f"{summary['anchor_forward_backward_s']:.2f} s"),
        ("refresh", f"{summary['refresh_s']:.2f} s"),
        (
            "**refresh over forward-backward of the same anchors**",
            f"{summary['refresh_over_anchor_forward_backward']:.2f}",
        ),
        (
            f"added in all with a refresh every {p} steps, share of the AdamW training step",
            _percent(summary["overhead_with_refreshes"]),
        ),
    ]
    return _markdown(("", "median"), rows)


def memory_table(result: Facts) -> str:
    """Bytes of the sketch beside the weights."""
    labels = {
        "measured": "SmolLM2-135M, measured",
        "llama_3_1_8b_from_shapes": "Llama-3.1-8B, computed from shapes",
    }
    rows = [
        (
            labels[name],
            str(facts["tokens"]),
            f"{facts['sketch_bytes'] / 2**20:.0f} MiB",
            _percent(facts["share_of_fp32_weights"]),
            _percent(facts["share_of_bf16_weights"]),
        )
        for name, facts in result["memory"].items()
    ]
    heads = ("", "tokens per anchor", "sketch (fp32)", "of fp32 weights", "of bf16 weights")
    return _markdown(heads, rows)


def compression_table(result: Facts) -> str:
    """Errors per compression rank."""
    rows = [
        (
            str(error["compression_rank"] or "exact"),
            _percent(error["lost_energy"]),
            _percent(error["gram_error"]),
            _percent(error["tangent_error"]),
            _percent(error["velocity_left"]),
            f"{error['sketch_bytes'] / 2**20:.0f} MiB",
        )
        for error in result["compression"]
    ]
    heads = ("q", "energy lost", "Gram error", "tangent error", "velocity left", "sketch")
    return _markdown(heads, rows)


def step_table() -> str:
    """The guarded step alone, by parameters, from the committed files of `step.py`."""
    rows = [row for name in ("sizes", "large") for row in _read(f"step-{name}-cpu")["rows"]]
    lines = [
        (
            f"{row['parameters'] / 1e6:.0f} M",
            f"{row['guarded_over_adamw']:.2f}",
            f"{row['guarded_over_fused']:.2f}",
            f"{row['peak_mb']['guarded']:.0f} MB",
            f"{row['sketch_mb']:.0f} MB",
            f"{row['weights_mb']:.0f} MB",
            str(row["repeats"]),
        )
        for row in rows
    ]
    heads = ("parameters", "over AdamW", "over fused AdamW", "peak beyond its state", "sketch")
    return _markdown((*heads, "weights", "repeats"), lines)


def growth_table() -> str:
    """The guarded step alone, by N, q and k, from the committed file of `step.py`."""
    rows = _read("step-growth-cpu")["rows"]
    lines = [
        (
            str(row["anchors"]),
            str(row["compression_rank"]),
            str(row["kept_directions"]),
            f"{row['guarded_over_adamw']:.2f}",
            f"{row['guarded_over_fused']:.2f}",
            f"{row['peak_mb']['guarded']:.0f} MB",
            f"{row['sketch_mb']:.0f} MB",
        )
        for row in rows
    ]
    heads = ("N", "q", "k", "over AdamW", "over fused AdamW", "peak beyond its state", "sketch")
    return _markdown(heads, lines)


def empty_table() -> str:
    """SafeAdamW without a guard beside AdamW, from the committed file of `step.py`."""
    rows = _read("step-empty-cpu")["rows"].items()
    lines = [(name, f"{row['safe_over_adamw']:.3f}") for name, row in rows]
    return _markdown(("AdamW step", "SafeAdamW(guard=None) over it"), lines)


def leak_table() -> str:
    """Leak of the stored weights by dtype, from the committed file of `leak.py`."""
    facts = _read("leak-cpu")
    rates = sorted({row["lr"] for row in facts["rows"]}, reverse=True)
    by_case = {(row["variant"], row["lr"]): row["runs"] for row in facts["rows"]}
    names = dict.fromkeys(row["variant"] for row in facts["rows"])
    lines = [
        (name, *(_spread(by_case[name, lr], what) for lr in rates for what in ("step", "drift")))
        for name in names
    ]
    columns = [f"{what}, lr {lr:g}" for lr in rates for what in ("a step", "drift")]
    return _markdown(("weights", *columns), lines)


def _spread(runs: Sequence[Facts], what: str) -> str:
    """Median over seeds, with the least and the most."""
    values = sorted(run[what] for run in runs)
    return f"{statistics.median(values):.1e} ({values[0]:.1e} to {values[-1]:.1e})"


def passport_table() -> str:
    """What `safeopt measure` takes on SmolLM2, and its file, also computed at Llama-3.1-8B."""
    result = _read("passport-smollm2-cpu")
    rows = [
        ("`safeopt measure`, loading included", f"{result['seconds']:.0f} s"),
        ("file on SmolLM2-135M", _file_size(result)),
        *(
            (f"bases at Llama-3.1-8B, computed: {label}", _file_size(facts))
            for label, facts in result["llama_3_1_8b_from_shapes"].items()
        ),
    ]
    return _markdown((f"{result['anchors']} anchors, fp32", ""), rows)


def _file_size(facts: Facts) -> str:
    share = _percent(facts["share_of_fp32_weights"])
    return f"{facts['file_bytes'] / 2**20:.0f} MiB, {share} of the fp32 weights"


def measuring_table() -> str:
    """Time and memory of measuring by model size and number of anchors."""
    rows = [
        (
            f"{row['parameters'] / 1e6:.0f} M",
            f"{row['hidden']} x {row['layers']}",
            str(row["anchors"]),
            f"{row['median_s']['passport']:.2f} s",
            f"{row['passport_over_forward']:.1f}",
            f"{row['peak_mb']['passport']:.0f} MiB",
            f"{row['peak_mb']['forward']:.0f} MiB",
            f"{row['weights_mb']:.0f} MiB",
        )
        for row in _read("passport-growth-cpu")["rows"]
    ]
    heads = (
        "parameters",
        "width x layers",
        "N",
        "CPU time of a passport",
        "over a forward pass of N",
    )
    more = ("peak beyond the weights", "peak of the forward pass", "weights")
    return _markdown((*heads, *more), rows)


def _read(name: str) -> Facts:
    facts: Facts = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return facts


def origin(result: Facts) -> str:
    """The command, the machine and the sizes behind the tables."""
    where, sizes = result["environment"], result["settings"]
    versions = where["versions"]
    return (
        f"`{result['command']}`, {where['date'][:10]}: {where['processor']}, "
        f"{where['torch_threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; {sizes['rows']} x {sizes['tokens']} training tokens, "
        f"{sizes['anchors']} anchors padded to {result['memory']['measured']['tokens']} tokens, "
        f"k = {result['guard']['rank']}, {sizes['repeats']} repeats."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if abs(share) < 0.1 else f"{100 * share:.0f} %"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str]) -> None:
    """Fill the README."""
    result = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    parts = {
        "time": time_table(result),
        "memory": memory_table(result),
        "compression": compression_table(result),
        "origin": origin(result),
        "step": step_table(),
        "growth": growth_table(),
        "empty": empty_table(),
        "leak": leak_table(),
        "passport": passport_table(),
        "measuring": measuring_table(),
    }
    write_text(README, fill(README.read_text(encoding="utf-8"), parts))


if __name__ == "__main__":
    main(sys.argv[1:])
