"""Write the tables of docs/kernels.md from the result files of this folder.

python -m benchmarks.kernels.tables
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels.compiled import TARGETS
from benchmarks.kernels.cpu_variants import BASE, LOOK, NATIVE, NATIVE_BF16
from benchmarks.markdown import fill
from safeopt.files import write_text

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"

Facts = Mapping[str, Any]


def register_table(result: Facts) -> str:
    """The most that any form of a kernel and pair of dtypes needs, per target."""
    groups: dict[tuple[str, str], dict[str, list[Facts]]] = defaultdict(lambda: defaultdict(list))
    for row in result["rows"]:
        groups[_group(row["specialisation"])][row["target"]].append(row)
    rows = [
        (f"`{kernel}`", dtypes, *(_most(targets[target]) for target in TARGETS))
        for (kernel, dtypes), targets in groups.items()
    ]
    return _markdown(("kernel", "weights, factors", *TARGETS), rows)


def _group(specialisation: str) -> tuple[str, str]:
    """Kernel and dtypes out of "propose-bfloat16-float32-float32-16-aligned" and its like."""
    kernel, *words = specialisation.split("-")
    dtypes = [word for word in words if "float" in word]
    return kernel, f"{_SHORT[dtypes[0]]}, {_SHORT[dtypes[-1]]}"


_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def _most(rows: Sequence[Facts]) -> str:
    registers, shared, spilled = (
        max(row[name] for row in rows) for name in ("registers", "shared", "spilled")
    )
    return f"{registers}, {shared / 1024:.0f} KiB, {spilled}"


def compile_summary(result: Facts) -> str:
    """How many forms were compiled, and what all of them show."""
    rows = result["rows"]
    spilled = sum(row["spilled"] > 0 for row in rows)
    broken = sum(bool(row["problems"]) for row in rows)
    return (
        f"{len(rows)} forms compiled ({len(TARGETS)} targets); {spilled} spill registers,"
        f" {broken} break a ceiling or an assertion."
    )


def bytes_table(result: Facts) -> str:
    """Floor and count of every way to run a kernel."""
    rows = [
        (
            row["kernel"],
            row["weights"],
            row["rounding"],
            str(row["floor"]),
            f"{row['counted']:.2f}",
            f"{100 * (row['over_floor'] - 1):.1f} %",
        )
        for row in result["rows"]
    ]
    return _markdown(("", "weights", "stored", "floor", "counted", "above"), rows)


def provider_table(result: Facts) -> str:
    """Predicted bytes per parameter at full size, and times on the CPU over fused AdamW."""
    names = dict.fromkeys(row["provider"] for row in result["bytes"])
    rows = [
        (
            name,
            *(
                _span(r["bytes_per_parameter"] for r in _of(result["bytes"], name, dtype))
                for dtype in ("float32", "bfloat16")
            ),
            _span((r["over_fused"] for r in _of(result["measured"], name, "float32")), digits=2),
        )
        for name in names
    ]
    head = ("provider", "bytes per parameter, fp32", "bf16", "CPU time over fused AdamW, fp32")
    return _markdown(head, rows)


def _of(rows: Sequence[Facts], provider: str, dtype: str) -> list[Facts]:
    return [row for row in rows if row["provider"] == provider and row["dtype"] == dtype]


def _span(values: Iterable[float], digits: int = 1) -> str:
    """Least and greatest value, or one where they read alike."""
    found = sorted(values)
    if not found:
        return ""
    low, high = f"{found[0]:.{digits}f}", f"{found[-1]:.{digits}f}"
    return low if low == high else f"{low} to {high}"


def sketch_table(result: Facts) -> str:
    """Bytes of every way over those of a kernel, arithmetic, and CPU times over eager torch."""
    rows = []
    for work in result["works"]:
        floor = work["floor_bytes"]
        for name, cost in work["ways"].items():
            first = name == "eager"
            rows.append(
                (
                    work["work"] if first else "",
                    f"{work['product_flops'] / floor:.0f}" if first else "",
                    name,
                    f"{cost['bytes'] / floor:.2f}",
                    f"{work['cpu_ratio'][name]:.2f}",
                )
            )
    head = ("work", "flops per byte of the floor", "way", "bytes over the floor", "CPU time")
    return _markdown(head, rows)


def ways_table(amx: Facts, vectors: Facts) -> str:
    """Processor time over fused AdamW of every way to step on a CPU, without and with tiles."""
    rows = [
        (
            f"**{way}**" if way in (NATIVE, NATIVE_BF16) else way,
            f"{ratio:.2f}",
            f"{vectors['over_fused'][way]:.2f}",
            f"{vectors['coefficient_error'][way]:.0e}",
        )
        for way, ratio in amx["over_fused"].items()
        if way != BASE
    ]
    return _markdown(("way", *_CPUS, "error of c"), rows)


def parts_table(amx: Facts, vectors: Facts) -> str:
    """Clock time over fused AdamW of what the step in C++ consists of."""
    rows = [
        (part, f"{ratio:.2f}", f"{vectors['parts_over_fused'][part]:.2f}", f"{_bytes(part):.2f}")
        for part, ratio in amx["parts_over_fused"].items()
    ]
    return _markdown(("part", *_CPUS, "bytes over its 28"), rows)


def _bytes(part: str) -> float:
    """What a part reads and writes of fp32 weights, gradients and moments, over 28 bytes."""
    if part.startswith("pass 1"):
        return 1.0
    return (4 if part == LOOK else 8) / 28


def step_table(steps: Mapping[str, Sequence[Facts | None]]) -> str:
    """Whole guarded steps over fused AdamW, with quartiles, and the first reference over them."""
    rows = [
        (
            products,
            *(_spread(one) if one else "" for one in found),
            ", ".join(f"{one['first_over_guarded']:.1f} x" for one in found if one),
        )
        for products, found in steps.items()
    ]
    return _markdown(("products", *_CPUS, "as fast as the first reference"), rows)


def _spread(paired: Facts) -> str:
    seconds = paired["seconds"]
    turns = [a / b for a, b in zip(seconds["guarded"], seconds["fused"], strict=True)]
    low, _, high = statistics.quantiles(turns, n=4)
    return f"{paired['guarded_over_fused']:.2f} ({low:.2f} to {high:.2f})"


_CPUS = ("Xeon, AMX", "EPYC, AVX-512")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parts() -> dict[str, str]:
    """Every generated part of the page by the name of its markers."""
    registers = _read("registers.json")
    cpus = _read("cpu_variants.json"), _read("cpu_variants-avx512.json")
    steps: dict[str, Sequence[Facts | None]] = {
        "fp32, or of halves": (_read("paired.json"), _read("paired-avx512.json")),
        "bf16 (`--precision medium`)": (
            _read("paired-bf16.json"),
            _read("paired-avx512-bf16.json"),
        ),
        "plain torch": (None, _read("paired-torch.json")),
    }
    return {
        "forms": compile_summary(registers),
        "registers": register_table(registers),
        "bytes": bytes_table(_read("moved.json")),
        "providers": provider_table(_read("run-cpu.json")),
        "sketch": sketch_table(_read("sketch.json")),
        "cpu ways": ways_table(*cpus),
        "cpu parts": parts_table(*cpus),
        "cpu steps": step_table(steps),
    }


def _read(name: str) -> Facts:
    facts: Facts = json.loads((RESULTS / name).read_text())
    return facts


def main() -> int:
    """Fill the page."""
    write_text(PAGE, fill(PAGE.read_text(), parts()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
