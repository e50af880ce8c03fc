"""Training rows to token ids: column layouts, chat template, masking, and the batch plan."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safeopt.anchors import IGNORED
from safeopt.files import read_jsonl

log = logging.getLogger(__name__)

LAYOUTS = (
    '{"messages": [...]}',
    '{"prompt": ..., "completion" | "reply": ...}',
    '{"text": ...}',
    '{"instruction": ..., "input": ..., "output": ...}',
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One tokenised row.

    Args:
        input_ids: Token ids of the whole conversation.
        labels: The same ids with everything that carries no loss set to -100.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def targets(self) -> int:
        """Tokens that carry loss; the first token is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSONL file.

    Raises:
        ValueError: The file is missing or empty, or a line is not a JSON object; the message
            names file and line.
    """
    rows = [{**row, "_where": where} for where, row in read_jsonl(path)]
    if not rows:
        raise ValueError(
            f"{path}: no rows; expected one JSON object a line: {' or '.join(LAYOUTS)}"
        )
    return rows


def required_rows(dataset: str | None, rows: Sequence[Row] | None) -> Sequence[Row]:
    """The rows in memory, otherwise those of the file ``dataset``.

    Raises:
        ValueError: Neither is given, or the file cannot be read.
    """
    if rows is not None:
        return rows
    if dataset is None:
        raise ValueError("set dataset to a JSONL file, or pass rows")
    return read_rows(dataset)


def tokenize(
    rows: Sequence[Row], tokenizer: Any, max_length: int, completion_only_loss: bool = True
) -> list[Example]:
    """Turn rows of any layout in `LAYOUTS` into `Example` objects.

    A row longer than ``max_length`` is cut on the right, and a warning counts such rows. A row
    whose loss tokens would all be cut is an error.

    Raises:
        ValueError: A row has an unknown layout, an empty field, or no token left that carries
            loss. Rows are named by file and line, or by index when they come from memory.
    """
    if not rows:
        raise ValueError(f"no training rows; expected rows such as {' or '.join(LAYOUTS)}")
    places = [str(row.get("_where", f"row {index}")) for index, row in enumerate(rows)]
    whole = [
        _example(row, where, tokenizer, completion_only_loss)
        for row, where in zip(rows, places, strict=True)
    ]
    examples = [_cut(e, where, max_length) for e, where in zip(whole, places, strict=True)]
    cut_rows = sum(len(example.input_ids) > max_length for example in whole)
    if cut_rows:
        log.warning("%d of %d rows are cut to max_length=%d", cut_rows, len(rows), max_length)
    return examples


def _cut(example: Example, where: str, max_length: int) -> Example:
    cut = Example(example.input_ids[:max_length], example.labels[:max_length])
    if cut.targets == 0:
        raise ValueError(
            f"{where}: no reply token within max_length={max_length} (the row has "
            f"{len(example.input_ids)} tokens); raise max_length or shorten the prompt"
        )
    return cut


def _example(row: Row, where: str, tokenizer: Any, completion_only: bool) -> Example:
    if "text" in row and "messages" not in row and "prompt" not in row:
        return _plain_text(text_field(row, "text", where), tokenizer)
    messages = _messages(row, where)
    if not isinstance(messages[-1], Mapping) or messages[-1].get("role") != "assistant":
        raise ValueError(f"{where}: the last message must come from the assistant")
    for message in messages:
        text_field(message, "content", where)
    if messages[0]["role"] == "assistant":
        raise ValueError(f"{where}: the first message must come from the user or the system")
    return _conversation(messages, where, tokenizer, completion_only)


def text_field(row: Row, name: str, where: str) -> str:
    """The text in column ``name``, or a `ValueError` that says where it is missing."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {name!r} must be a non-empty string; got {value!r}")
    return value


def _messages(row: Row, where: str) -> list[dict[str, str]]:
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"{where}: 'messages' must be a non-empty list")
        return messages
    if "prompt" in row and ("completion" in row or "reply" in row):
        return [*_turns(row["prompt"], "user", where), *_turns(_reply(row), "assistant", where)]
    if "instruction" in row and "output" in row:
        prompt = "\n\n".join(t for t in (row["instruction"], row.get("input")) if t)
        return [*_turns(prompt, "user", where), *_turns(row["output"], "assistant", where)]
    columns = sorted(key for key in row if key != "_where")
    raise ValueError(f"{where}: columns {columns} fit no layout; use {' or '.join(LAYOUTS)}")


def _reply(row: Row) -> Any:
    return row["completion"] if "completion" in row else row["reply"]


def _turns(value: Any, role: str, where: str) -> list[dict[str, str]]:
    # TRL's conversational prompt/completion rows hold lists of messages instead of strings.
    if isinstance(value, list):
        return value
    return [{"role": role, "content": text_field({role: value}, role, where)}]


def _plain_text(text: str, tokenizer: Any) -> Example:
    ids = list(tokenizer(text)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return Example(tuple(ids), tuple(ids))


def _conversation(
    messages: list[dict[str, str]], where: str, tokenizer: Any, completion_only: bool
) -> Example:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where}: the tokenizer has no chat template; set tokenizer.chat_template or use "
            '{"text": ...} rows'
        )
    ids = _template_ids(messages, tokenizer)
    if not completion_only:
        return Example(tuple(ids), tuple(ids))
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(_template_ids(messages[:turn], tokenizer, add_generation_prompt=True))
            end = len(_template_ids(messages[: turn + 1], tokenizer))
            labels[start:end] = ids[start:end]
    return Example(tuple(ids), tuple(labels))


def _template_ids(messages: list[dict[str, str]], tokenizer: Any, **kwargs: Any) -> list[int]:
    # Tokenised from text so that the same call works with fast and slow tokenizers alike.
    text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of the token ids and labels; a resumed run must see the same one."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.input_ids, example.labels)).encode())
    return digest.hexdigest()


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded ``input_ids``, ``attention_mask``, ``labels``, each (rows, length)."""
    length = max(len(example.input_ids) for example in examples)
    pad = [length - len(example.input_ids) for example in examples]
    pairs = list(zip(examples, pad, strict=True))
    return {
        "input_ids": torch.tensor([[*e.input_ids, *[pad_token_id] * p] for e, p in pairs]),
        "attention_mask": torch.tensor([[1] * len(e.input_ids) + [0] * p for e, p in pairs]),
        "labels": torch.tensor([[*e.labels, *[IGNORED] * p] for e, p in pairs]),
    }


@dataclass(frozen=True)
class BatchPlan:
    """Which rows each optimizer step sees: a function of seed and step, of nothing else.

    Rows are shuffled anew for every epoch and read as one endless stream, so every step is full
    and a run resumes from its step number alone.

    Args:
        rows: Number of rows.
        rows_per_step: Rows of one optimizer step over all processes and micro-batches.
        seed: Seed of the row order.
    """

    rows: int
    rows_per_step: int
    seed: int

    def indices(self, step: int) -> list[int]:
        """Row indices of optimizer step ``step`` (from 0)."""
        start = step * self.rows_per_step
        stream = range(start, start + self.rows_per_step)
        return [_order(self.rows, self.seed, i // self.rows)[i % self.rows] for i in stream]


@lru_cache(maxsize=4)
def _order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(rows, generator=generator).tolist())
