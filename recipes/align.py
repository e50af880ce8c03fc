"""Make an aligned model: supervised refusals and helpful replies, full weights or LoRA.

python recipes/align.py --config recipes/configs/align.yaml --dataset rows.jsonl --output_dir out

Rows carry ``"kind": "refuse"`` (harmful prompt, safe reply) or ``"comply"`` (harmless prompt,
helpful reply).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from safeopt.training import run_recipe


def both_kinds(rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows of one kind: a model that only sees refusals learns to refuse everything."""
    kinds = Counter(row.get("kind") for row in rows)
    for kind, use in (("refuse", "harmful prompts"), ("comply", "harmless prompts")):
        if not kinds[kind]:
            raise ValueError(f'no row has "kind": "{kind}"; add replies to {use}, about half')


if __name__ == "__main__":
    sys.exit(run_recipe(sys.argv[1:], "Supervised refusals and helpful replies.", both_kinds))
