"""Files and folders that are on disk whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_jsonl(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Read a file of one JSON object a line, skipping empty lines.

    Returns:
        Pairs of where the object stands ("file:line") and the object.

    Raises:
        ValueError: the file cannot be read, or a line is no JSON object; names file and line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1)]
    return [(where, _parse_object(where, line)) for where, line in numbered if line.strip()]


def _parse_object(where: str, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got a {type(value).__name__}")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a text file through a temporary one, so that readers never see half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write one indented JSON document."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``target`` when the block ends without an error.

    A ``target`` that another process finished in the meantime is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
