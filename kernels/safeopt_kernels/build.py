"""Compiling the C++ of this package once, on demand, and keeping it in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def cache_dir() -> Path:
    """Folder of all that is kept: ``SAFEOPT_CACHE``, else ``safeopt`` in the user's cache."""
    chosen = os.environ.get("SAFEOPT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "safeopt"


def compiler() -> str | None:
    """The C++ compiler: ``CXX`` or ``c++``, if it is there."""
    return shutil.which(os.environ.get("CXX") or "c++")


def library(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """Load the shared library made of a C++ file and the headers beside it.

    It is compiled unless the cache has it, under a name that changes with the sources, the flags
    and the compiler. Processes that compile at the same time do not disturb one another.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: the cache cannot be written, or the library cannot be loaded.
    """
    found = compiler()
    if found is None:
        raise RuntimeError("there is no C++ compiler (install g++, or set CXX)")
    sources = [path.read_bytes() for path in sorted(source.parent.iterdir())]
    command = [found, *flags, str(source)]
    parts = [*sources, " ".join([found, *flags]).encode(), _version(found)]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    target = cache_dir() / "kernels" / f"{source.stem}-{name}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _compile(command, target)
    return ctypes.CDLL(str(target))


def _compile(command: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            error = next((line for line in done.stderr.splitlines() if "error" in line), "")
            raise RuntimeError(f"{command[0]} cannot compile {command[-1]} ({error.strip()})")
        made.replace(target)  # whole or not at all


def _version(program: str) -> bytes:
    return subprocess.run([program, "--version"], capture_output=True, check=False).stdout
