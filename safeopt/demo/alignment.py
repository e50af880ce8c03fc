"""Training rows that make SmolLM2-135M-Instruct refuse.

    python -m safeopt.demo.alignment align.jsonl

Harmful prompts are paired with varied refusals, harmless ones with what the model itself
answers, so that only its refusals change.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safeopt.demo import assets, data
from safeopt.evaluation import Decoding, greedy_replies, is_refusal
from safeopt.files import write_jsonl

_SENTENCE_END = re.compile(r"(?<!\d)[.!?](?=\s|$)")


def alignment_rows(model: Any, tokenizer: Any, decoding: Decoding) -> list[data.AnchorRow]:
    """About as many ``refuse`` rows as ``comply`` rows, from ``data.alignment_prompts``."""
    harmful, harmless = data.alignment_prompts()
    return data.refuse_rows(harmful) + answered(model, tokenizer, harmless, decoding)


def answered(
    model: Any, tokenizer: Any, prompts: Sequence[str], decoding: Decoding
) -> list[data.AnchorRow]:
    """``comply`` rows with the model's own replies, cut to whole sentences.

    Prompts that the model refuses, or answers without finishing a sentence, are left out.
    """
    replies = map(whole_sentences, greedy_replies(model, tokenizer, prompts, decoding))
    return [
        data.AnchorRow(prompt=prompt, reply=reply, kind="comply")
        for prompt, reply in zip(prompts, replies, strict=True)
        if reply and not is_refusal(reply)
    ]


def refused(
    model: Any, tokenizer: Any, prompts: Sequence[str], decoding: Decoding
) -> list[data.AnchorRow]:
    """``refuse`` rows with the model's own refusals; prompts that it answers are left out."""
    replies = map(whole_sentences, greedy_replies(model, tokenizer, prompts, decoding))
    return [
        data.AnchorRow(prompt=prompt, reply=reply, kind="refuse")
        for prompt, reply in zip(prompts, replies, strict=True)
        if is_refusal(reply)
    ]


def whole_sentences(reply: str) -> str:
    """``reply`` up to its last full stop; empty when there is none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(reply)]
    return reply[: ends[-1]] if ends else ""


def main() -> None:
    """Write the rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description="Write the safety adapter's training rows.")
    parser.add_argument("output", type=Path, help="JSONL file to write")
    output = parser.parse_args().output
    folder = assets.smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    rows = alignment_rows(
        model, AutoTokenizer.from_pretrained(folder), Decoding(96, 48, dtype="bfloat16")
    )
    write_jsonl(output, rows)
    print(f"{len(rows)} rows written to {output}")


if __name__ == "__main__":
    main()
