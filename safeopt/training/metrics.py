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
        old = self.path.read_text("utf-8").splitlines() if step and self.path.exists() else []
        kept = [line for line in old if json.loads(line)["step"] <= step]
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def append(self, record: dict[str, Any]) -> None:
        """Write one line."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
