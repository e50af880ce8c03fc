"""Time ``safeopt diagnose`` of SmolLM2-135M: ``python -m benchmarks.forecast.cost``.

The command is what a user types, in a process of its own: a model folder, anchors and rows as
JSONL, a run of 100 steps under bf16 autocast with all weights or a LoRA adapter, as many anchors
and rows a step as in the runs that forecasts were compared with, replies judged, the whole
condition and the report.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.collapse.chat import ADAPTER, data_file
from benchmarks.forecast.smols import ANCHORS, BATCH
from safeopt.demo import data
from safeopt.demo.alignment import refused
from safeopt.demo.worker import load_aligned
from safeopt.environment import environment
from safeopt.evaluation import Decoding
from safeopt.files import write_json, write_jsonl
from safeopt.training.data import read_rows

RESULT = Path(__file__).parent / "results" / "cost.json"
OPTIONS = {
    "steps": "100",
    "warmup_steps": "5",
    "per_device_train_batch_size": str(BATCH),
    "max_length": "256",
    "mixed_precision": "bf16",
}
MODES = {
    "full": {"lr": "1e-4"},
    "lora": {"lr": "1e-3", "use_peft": "true", "lora_r": "8"},
}


def prepare(folder: Path) -> None:
    """Write the aligned model, its refusals and GSM8K's rows, as a user would have them."""
    model, tokenizer = load_aligned(ADAPTER)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    prompts = data.advbench().train[: ANCHORS * 4 // 3]
    anchors = refused(model, tokenizer, prompts, Decoding(32, dtype="bfloat16"))[:ANCHORS]
    write_jsonl(folder / "anchors.jsonl", [dict(row) for row in anchors])
    rows = read_rows(data_file("gsm8k_train.jsonl"))
    short = [row for row in rows if len(row["question"]) + len(row["answer"]) <= 400]
    named = [{"prompt": row["question"], "reply": row["answer"]} for row in short]
    write_jsonl(folder / "rows.jsonl", named)


def command(folder: Path, mode: str) -> list[str]:
    """The command line."""
    options = {"model": "model", "anchors": "anchors.jsonl", "dataset": "rows.jsonl"}
    paths = [f"--{name}={folder / path}" for name, path in options.items()]
    plan = [f"--{name}={value}" for name, value in (OPTIONS | MODES[mode]).items()]
    return [sys.executable, "-m", "safeopt", "diagnose", *paths, *plan, "--json"]


def timed(folder: Path, mode: str, threads: int) -> dict[str, Any]:
    """Run the command; its seconds from start to end, imports included."""
    start = time.perf_counter()
    done = subprocess.run(
        [*command(folder, mode), "--report", str(folder / f"report-{mode}")],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if done.returncode not in (0, 3, 4):
        raise RuntimeError(f"safeopt diagnose failed: {done.stderr[-2000:]}")
    told = json.loads(done.stdout)
    kept = ("verdict", "reason", "anchors", "read_by", "pilot_steps", "stages")
    return {"seconds": round(seconds, 1), **{name: told[name] for name in kept}}


def main() -> None:
    """Prepare, time, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--folder", type=Path, help="work here, and leave the reports here")
    parser.add_argument("--mode", choices=tuple(MODES), action="append", help="default: both")
    arguments = parser.parse_args()
    output = arguments.output
    made = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        if not (folder / "rows.jsonl").exists():
            prepare(folder)
        for mode in arguments.mode or MODES:
            found = timed(folder, mode, arguments.threads)
            options = {"options": OPTIONS | MODES[mode]}
            made[mode] = options | found | environment() | {"torch_threads": arguments.threads}
            write_json(output, made)
            print(json.dumps(found))


if __name__ == "__main__":
    main()
