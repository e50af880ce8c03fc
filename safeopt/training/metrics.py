"""``metrics.jsonl``: one JSON object a logged step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safeopt.files import write_text


class MetricsLog:
    """Appends records to a file, or does nothing where ``path`` is ``None``.

    Args:
        path: The file; ``None`` on every process but the main one.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def start(self, step: int) -> None:
        """Keep what was logged up to ``step``; a resumed run writes the rest anew."""
        if self.path is None:
            return
        old = self.path.read_text("utf-8") if step and self.path.exists() else ""
        # A killed run may leave half a line at the end.
        whole = [line for line in old.splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        write_text(self.path, "".join(kept))

    def append(self, record: dict[str, Any]) -> None:
        """Write one line."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
