"""Facts about the machine and the installed versions, for result files and bug reports."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("safeopt-llm", "torch", "triton", "transformers", "accelerate", "peft", "safetensors")
_KIND = {"family": "cpu family", "model": "model"}  # in /proc/cpuinfo


def environment() -> dict[str, Any]:
    """Describe where this process runs: machine, versions, threads and the date (UTC).

    Returns:
        Plain values, ready for JSON. Packages that are not installed map to None.
    """
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def reset_peak_memory() -> None:
    """Forget the process's peak memory where the system can (Linux); elsewhere do nothing."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")


def peak_memory_mb() -> float:
    """Largest resident size in MiB, since `reset_peak_memory` or since the process started."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM"))
        return round(int(peak.split()[1]) / 1024, 1)
    import resource  # POSIX only

    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    # platform.processor() is empty or just "x86_64" on Linux; and a virtual machine may keep to
    # itself more of the name than the maker, so that family and model have to tell.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    known = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = known.get("model name") or platform.processor()
    kind = [f"{key} {known[field]}" for key, field in _KIND.items() if field in known]
    return f"{name} ({', '.join(kind)})" if kind else name
