"""Make an aligned model: supervised refusals and helpful replies, full weights or LoRA.

python recipes/align.py --config recipes/configs/align.yaml --dataset rows.jsonl --output_dir out
"""

from __future__ import annotations

import sys

from safeopt.training import parse_args, train


def main(argv: list[str]) -> int:
    """Train on rows that hold refusals to harmful prompts and helpful replies to harmless ones."""
    try:
        config = parse_args(argv, "Align a model by supervised refusals and helpful replies.")
        result = train(config)
    except (ValueError, RuntimeError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{result.steps} steps, loss {result.loss:.3f}; written to {result.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
