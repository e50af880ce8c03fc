"""Figures taken while a run goes on: held-out task NLL and refusal rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from safeopt import Anchors
from safeopt.diagnostics import Monitor
from safeopt.training import data
from safeopt.training.config import TrainConfig

Probe = Callable[[nn.Module, int], dict[str, float]]
"""Called with the unwrapped model, in eval mode without gradients, and the steps made so far."""


def from_config(config: TrainConfig, tokenizer: Any) -> list[Probe]:
    """The probes that ``eval_dataset`` and ``probe_dataset`` ask for.

    Raises:
        ValueError: A file is missing or a row has the wrong columns.
    """
    wanted: list[Probe] = []
    if config.eval_dataset is not None:
        wanted.append(_task_nll(config, data.read_rows(config.eval_dataset), tokenizer))
    if config.probe_dataset is not None:
        wanted.append(_refusal_rate(config, data.read_rows(config.probe_dataset), tokenizer))
    return wanted


def monitor(
    config: TrainConfig,
    anchors: Anchors | None,
    steps: int,
    task: Callable[[nn.Module], Tensor] | None,
) -> Monitor | None:
    """The monitor that ``config.monitor`` asks for; with ``task`` it measures the geometry too.

    Raises:
        ValueError: It is asked for without anchors, or without an ``eval_steps`` to look at.
    """
    if config.monitor == "off":
        return None
    if anchors is None or config.eval_steps == 0:
        raise ValueError(
            f"monitor {config.monitor} reads anchors every eval_steps steps: set `anchors` to a "
            "JSONL file, or pass them, and eval_steps to a number above 0"
        )
    every = config.monitor_geometry
    return Monitor(
        anchors.of_kind("refuse"),
        steps,
        task=task if every else None,
        geometry_every=max(1, every),
    )


def _task_nll(config: TrainConfig, rows: list[dict[str, Any]], tokenizer: Any) -> Probe:
    # safeopt.evaluation reads rows with this package, so it is imported when it is used.
    from safeopt.evaluation.nll import reply_nll

    data.tokenize(rows, tokenizer, config.max_length)

    def probe(model: nn.Module, step: int) -> dict[str, float]:
        return {"eval_loss": reply_nll(model, tokenizer, rows, config.max_length)}

    return probe


def _refusal_rate(config: TrainConfig, rows: list[dict[str, Any]], tokenizer: Any) -> Probe:
    from safeopt.evaluation.generation import Decoding, greedy_replies
    from safeopt.evaluation.refusal import is_refusal

    chosen = rows[: config.probe_samples or None]
    # On a CPU a bfloat16 copy decodes many times faster than autocast, which casts at every token.
    decoding = Decoding(dtype="bfloat16" if config.mixed_precision == "bf16" else None)
    prompts = [data.text_field(row, "prompt", str(row["_where"])) for row in chosen]

    def probe(model: nn.Module, step: int) -> dict[str, float]:
        replies = greedy_replies(model, tokenizer, prompts, decoding)
        return {"probe/refusal_rate": sum(map(is_refusal, replies)) / len(replies)}

    return probe
