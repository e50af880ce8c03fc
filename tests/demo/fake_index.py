"""A folder of small wheels that pip downloads from, in place of the package index."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safeopt.demo.assets import Wheel


def build_wheel(folder: Path, like: Wheel, members: Mapping[str, str]) -> Wheel:
    """Write a wheel with ``like``'s name and version; return it with its own sha256."""
    stem = f"{like.name.replace('-', '_')}-{like.version}"
    info = f"{stem}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {like.name}\nVersion: {like.version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as packed:
        for name, text in members.items():
            packed.writestr(name, text)
        packed.writestr(f"{info}/METADATA", metadata)
        packed.writestr(f"{info}/WHEEL", tags)
        packed.writestr(f"{info}/RECORD", "")
    return replace(like, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
