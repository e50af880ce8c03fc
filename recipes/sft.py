"""Fine-tune an aligned model on your own rows, with AdamW or with SafeAdamW.

python recipes/sft.py --config recipes/configs/sft.yaml --dataset rows.jsonl --output_dir out
accelerate launch recipes/sft.py --config recipes/configs/sft.yaml --dataset rows.jsonl ...
"""

from __future__ import annotations

import sys

from safeopt.training import run_recipe

if __name__ == "__main__":
    sys.exit(run_recipe(sys.argv[1:], "Supervised fine-tuning that keeps a model's refusals."))
