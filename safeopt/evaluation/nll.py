"""Teacher-forced negative log-likelihood of given replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safeopt.evaluation.generation import evaluating
from safeopt.training.data import Example, collate, tokenize
from safeopt.training.loss import nll_sum


def reply_nll(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    max_length: int = 512,
    batch_size: int = 16,
) -> float:
    """Mean NLL of a reply token, in nats, over all reply tokens of ``rows``.

    ``-Σ log p(y_t | prompt, y_<t) / Σ 1`` over reply tokens. On refusals to harmful prompts this
    is the refusal NLL, on task rows the task NLL.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer, with a chat template.
        rows: Rows of any layout that ``safeopt.training`` reads, such as ``prompt`` and ``reply``.
        max_length: Longest row in tokens; longer rows are cut on the right.
        batch_size: Rows scored together.

    Raises:
        ValueError: A row is malformed or keeps no reply token.
    """
    examples = sorted(tokenize(rows, tokenizer, max_length), key=lambda e: len(e.input_ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    total, count = 0.0, 0
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            total += _summed_nll(model, batch, pad)
            count += sum(example.targets for example in batch)
    return total / count


def _summed_nll(model: Any, examples: Sequence[Example], pad: int) -> float:
    batch = {name: value.to(model.device) for name, value in collate(examples, pad).items()}
    labels = batch.pop("labels")
    return float(nll_sum(model(**batch).logits, labels))
