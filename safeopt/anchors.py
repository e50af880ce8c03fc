"""Anchors: the few examples whose behaviour fine-tuning must leave where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from safeopt.files import read_jsonl

Kind = Literal["refuse", "comply"]
IGNORED = -100
_NONE = "no anchors: pass at least one example (16 to 512 are usual)"


class ChatTokenizer(Protocol):
    """The one method of a Hugging Face tokenizer that anchors need."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any:
        """Turn messages into token ids."""


@dataclass(frozen=True)
class AnchorBatch:
    """A right-padded batch of anchors.

    Attributes:
        input_ids: token ids, (N, T).
        attention_mask: 1 on tokens, 0 on padding, (N, T).
        labels: token ids on the reply, -100 elsewhere, (N, T).
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def to(self, device: torch.device) -> AnchorBatch:
        """Return the same batch on ``device``."""
        tensors = (self.input_ids, self.attention_mask, self.labels)
        return AnchorBatch(*(t.to(device) for t in tensors))

    def take(self, positions: Sequence[int]) -> AnchorBatch:
        """Return some of the anchors, as long as they are padded here."""
        chosen = list(positions)
        return AnchorBatch(self.input_ids[chosen], self.attention_mask[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Anchors:
    """Tokenised anchor examples.

    ``refuse`` anchors pair a harmful prompt with a safe reply; ``comply`` anchors pair a
    harmless prompt that looks risky with a helpful reply, and hold over-refusal down.

    Attributes:
        input_ids: prompt and reply tokens of each anchor, 1-D int64 tensors.
        labels: the same length; -100 on every token that is not part of the reply.
        kinds: "refuse" or "comply", one per anchor.
    """

    input_ids: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    kinds: tuple[Kind, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @classmethod
    def from_jsonl(
        cls, path: str | Path, tokenizer: ChatTokenizer, *, max_length: int | None = None
    ) -> Anchors:
        """Read anchors from a JSONL file and apply the tokenizer's chat template.

        Args:
            path: file whose rows are ``{"prompt" | "messages", "reply", "kind"}``; ``kind`` is
                "refuse" (the default) or "comply".
            tokenizer: a tokenizer with a chat template.
            max_length: longest allowed prompt plus reply, in tokens.

        Raises:
            ValueError: a row is not usable; the message names file and line.
        """
        return cls._from_located_rows(read_jsonl(path), tokenizer, max_length, source=str(path))

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: ChatTokenizer,
        *,
        max_length: int | None = None,
    ) -> Anchors:
        """Build anchors from rows in memory; the same columns and errors as `from_jsonl`."""
        located = [(f"row {number}", row) for number, row in enumerate(rows, 1)]
        return cls._from_located_rows(located, tokenizer, max_length, source="rows")

    @classmethod
    def from_tokens(
        cls,
        input_ids: Sequence[Sequence[int] | Tensor],
        labels: Sequence[Sequence[int] | Tensor],
        kinds: Sequence[Kind] | None = None,
    ) -> Anchors:
        """Build anchors from token ids, for people with their own tokenizer.

        Args:
            input_ids: one list of token ids per anchor.
            labels: the same lengths; -100 on tokens outside the reply.
            kinds: "refuse" or "comply" per anchor; all "refuse" when omitted.

        Raises:
            ValueError: no anchors, lengths that differ, an anchor without reply tokens, or an
                unknown kind.
        """
        default: Kind = "refuse"
        chosen = (default,) * len(input_ids) if kinds is None else tuple(kinds)
        if not len(input_ids) == len(labels) == len(chosen):
            raise ValueError(
                f"input_ids, labels and kinds must have one entry per anchor, got "
                f"{len(input_ids)}, {len(labels)} and {len(chosen)}"
            )
        if not input_ids:
            raise ValueError(_NONE)
        ids = tuple(torch.as_tensor(row, dtype=torch.int64) for row in input_ids)
        targets = tuple(torch.as_tensor(row, dtype=torch.int64) for row in labels)
        for i, (row, target, kind) in enumerate(zip(ids, targets, chosen, strict=True)):
            _check_tokens(f"anchor {i}", row, target)
            _check_kind(f"anchor {i}", kind)
        return cls(ids, targets, chosen)

    def of_kind(self, kind: Kind) -> Anchors:
        """The anchors of one kind, in order.

        Raises:
            ValueError: there is none.
        """
        chosen = [i for i, k in enumerate(self.kinds) if k == kind]
        if not chosen:
            raise ValueError(f'no anchor is of kind "{kind}"')
        return Anchors(
            tuple(self.input_ids[i] for i in chosen),
            tuple(self.labels[i] for i in chosen),
            tuple(self.kinds[i] for i in chosen),
        )

    def first(self, count: int) -> Anchors:
        """The first ``count`` anchors, or all of fewer."""
        return Anchors(self.input_ids[:count], self.labels[:count], self.kinds[:count])

    def every(self, step: int, start: int = 0) -> Anchors:
        """Every ``step``-th anchor, beginning with ``start``."""
        chosen = slice(start, None, step)
        return Anchors(self.input_ids[chosen], self.labels[chosen], self.kinds[chosen])

    def batch(self, indices: Sequence[int] | None = None) -> AnchorBatch:
        """Collate the chosen anchors (all by default) into one right-padded batch."""
        chosen = range(len(self)) if indices is None else indices
        ids = [self.input_ids[i] for i in chosen]
        pad = torch.nn.utils.rnn.pad_sequence
        return AnchorBatch(
            input_ids=pad(ids, batch_first=True),
            attention_mask=pad([torch.ones_like(row) for row in ids], batch_first=True),
            labels=pad([self.labels[i] for i in chosen], batch_first=True, padding_value=IGNORED),
        )

    def digest(self) -> str:
        """SHA-256 of the anchors' tokens, labels and kinds, in order."""
        digest = hashlib.sha256()
        for ids, labels, kind in zip(self.input_ids, self.labels, self.kinds, strict=True):
            digest.update(json.dumps([ids.tolist(), labels.tolist(), kind]).encode())
        return digest.hexdigest()

    @classmethod
    def _from_located_rows(
        cls,
        rows: Sequence[tuple[str, Mapping[str, Any]]],
        tokenizer: ChatTokenizer,
        max_length: int | None,
        source: str,
    ) -> Anchors:
        if not rows:
            raise ValueError(f"{source}: no anchors in it; write one JSON row per line")
        examples = [_tokenise(where, row, tokenizer, max_length) for where, row in rows]
        ids, labels, kinds = zip(*examples, strict=True)
        return cls(ids, labels, kinds)


def _messages(where: str, row: Mapping[str, Any]) -> list[dict[str, str]]:
    if ("messages" in row) == ("prompt" in row):
        raise ValueError(f'{where}: give either "prompt" or "messages"')
    if "messages" in row:
        return [dict(message) for message in row["messages"]]
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise ValueError(f'{where}: "prompt" must be a non-empty string')
    return [{"role": "user", "content": row["prompt"]}]


def _tokenise(
    where: str, row: Mapping[str, Any], tokenizer: ChatTokenizer, max_length: int | None
) -> tuple[Tensor, Tensor, Kind]:
    kind = row.get("kind", "refuse")
    _check_kind(where, kind)
    reply = row.get("reply")
    if not isinstance(reply, str) or not reply.strip():
        raise ValueError(f'{where}: an anchor needs a "reply" with text in it')
    messages = _messages(where, row)
    prompt = _template(tokenizer, messages, add_generation_prompt=True)
    whole = _template(tokenizer, [*messages, {"role": "assistant", "content": reply}])
    if whole[: len(prompt)] != prompt:
        raise ValueError(
            f"{where}: the chat template changes the prompt once a reply follows it; "
            "tokenise it yourself and use Anchors.from_tokens"
        )
    if max_length is not None and len(whole) > max_length:
        raise ValueError(
            f"{where}: {len(whole)} tokens do not fit max_length={max_length}; "
            "shorten the row or raise max_length (an anchor's reply is never cut)"
        )
    ids = torch.tensor(whole, dtype=torch.int64)
    labels = ids.clone()
    labels[: len(prompt)] = IGNORED
    _check_tokens(where, ids, labels)
    return ids, labels, kind


def _template(
    tokenizer: ChatTokenizer,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    return list(encoded)


def _check_kind(where: str, kind: object) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f'{where}: kind must be "refuse" or "comply", got {kind!r}')


def _check_tokens(where: str, ids: Tensor, labels: Tensor) -> None:
    if ids.ndim != 1 or ids.shape != labels.shape:
        raise ValueError(
            f"{where}: input_ids and labels must be lists of one length, got shapes "
            f"{tuple(ids.shape)} and {tuple(labels.shape)}"
        )
    if not bool((labels[1:] != IGNORED).any()):
        raise ValueError(
            f"{where}: no reply tokens (every label after the first is -100); "
            "an anchor needs a prompt and a reply"
        )
    if int(ids.min()) < 0:
        raise ValueError(f"{where}: negative token id {int(ids.min())} in input_ids")


def check_fits(model: nn.Module, anchors: Anchors) -> None:
    """Raise if token ids or lengths do not fit the model: another tokenizer made the anchors.

    Raises:
        ValueError: no anchors, a token id outside the vocabulary, or an anchor longer than the
            context.
    """
    if not len(anchors):
        raise ValueError(_NONE)
    config = getattr(model, "config", None)
    embed = getattr(model, "get_input_embeddings", None)
    table = embed() if callable(embed) else None
    vocabulary = table.num_embeddings if isinstance(table, nn.Embedding) else None
    context = getattr(config, "max_position_embeddings", None)
    for i, ids in enumerate(anchors.input_ids):
        if vocabulary is not None and int(ids.max()) >= vocabulary:
            raise ValueError(
                f"anchor {i} holds token id {int(ids.max())} but the model's vocabulary has "
                f"{vocabulary} entries; tokenise the anchors with this model's own tokenizer"
            )
        if context is not None and len(ids) > context:
            raise ValueError(
                f"anchor {i} has {len(ids)} tokens, more than the model's context of {context}; "
                "shorten it"
            )
