"""Training options: one frozen dataclass, filled from YAML and command-line flags.

Flag names follow TRL's ``SFTConfig`` and ``ModelConfig``. Flags win over ``--config file.yaml``;
an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

MAPPINGS = ("guard", "optimizer_options")
_NONE = ("none", "None", "null")
_YAML_FALSE = ("no", "off")  # words that PyYAML reads as False
OptimizerName = Literal["adamw", "safe_adamw", "sgd", "safe_sgd", "safe_muon"]
GUARDED: frozenset[OptimizerName] = frozenset({"safe_adamw", "safe_sgd", "safe_muon"})
_POSITIVE = (
    "max_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "lora_r",
)
_NOT_NEGATIVE = (
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "probe_samples",
    "monitor_geometry",
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a training run depends on, apart from the rows themselves.

    Args:
        output_dir: Folder for the model, ``metrics.jsonl``, ``config.yaml`` and checkpoints.
        model_name_or_path: Folder or hub id of a causal language model and its tokenizer.
        adapter_name_or_path: PEFT adapter merged into the model before training starts.
        dtype: Storage type of the weights. ``float32`` keeps master weights; use it with
            ``mixed_precision="bf16"`` rather than storing bfloat16 where memory allows.
        dataset: JSONL file of training rows (see `safeopt.training.data`).
        max_length: Longest example in tokens; longer ones are cut on the right.
        completion_only_loss: Take the loss on replies only; ``False`` on every token.
        learning_rate: Peak learning rate.
        per_device_train_batch_size: Rows per process and micro-batch.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        num_train_epochs: Passes over the rows; ignored when ``max_steps`` is positive.
        max_steps: Optimizer steps; 0 or less means ``num_train_epochs`` decides.
        lr_scheduler_type: Any name that ``transformers.get_scheduler`` knows.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Weight decay of matrices, decoupled but in SGD; norms and biases get none.
        max_grad_norm: Gradient clipping threshold; 0 switches clipping off.
        seed: Seed of initialisation, dropout and row order.
        logging_steps: Steps between lines of ``metrics.jsonl``.
        save_steps: Steps between checkpoints; 0 writes none.
        save_total_limit: Checkpoints kept; older ones are deleted. 0 keeps all.
        save_model: Write the trained model into ``output_dir`` at the end.
        save_dtype: Storage type of the written weights; ``None`` keeps the type trained in.
        resume_from_checkpoint: A checkpoint folder, or ``"latest"``.
        mixed_precision: Accelerate's setting; ``None`` takes what ``accelerate launch`` says.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        use_peft: Train a LoRA adapter instead of all weights.
        lora_r: LoRA rank.
        lora_alpha: LoRA scale numerator; the update is scaled by ``lora_alpha / lora_r``.
        lora_dropout: Dropout in front of the adapter.
        lora_target_modules: Names of the adapted modules, or ``"all-linear"``.
        optimizer: ``"adamw"`` and ``"sgd"`` are torch's; ``"safe_adamw"``, ``"safe_sgd"`` and
            ``"safe_muon"`` hold a guard. Muon moves hidden matrices, AdamW all else.
        optimizer_options: Further keywords of its constructor, for example
            ``{"momentum": 0.9, "nesterov": True}`` or ``{"rounding": "stochastic"}``.
        adam_beta1: First-moment decay of AdamW, also of the one beside Muon.
        adam_beta2: Second-moment decay of AdamW.
        adam_epsilon: Denominator term of AdamW.
        anchors: JSONL file of anchors; optimizers with a guard need them.
        guard: Keywords of `safeopt.Guard`, for example ``{"budget": 0.05}``.
        eval_dataset: JSONL file of held-out task rows; their NLL is logged as ``eval_loss``.
        probe_dataset: JSONL file of harmful prompts; the share of them that the model refuses is
            logged as ``probe/refusal_rate``.
        probe_samples: Prompts of ``probe_dataset`` used; 0 takes all.
        eval_steps: Steps between evaluations and probes; 0 runs them at the start and end only.
        monitor: Forecast the end of the run at every evaluation (see `eval_steps`) from the
            anchors' losses and openings. ``"log"`` logs it as ``safety/...``; ``"stop"`` also ends
            the run, and saves it, once the forecast is NO-GO; ``"guard"`` trains without the guard
            of an optimizer that has one until then.
        monitor_geometry: Evaluations between the monitor's measures of overlap and coupling, which
            cost more than its readings; 0 makes none. They are made in one process on float32
            weights only.
        progress: Show a progress bar (on a terminal).
    """

    output_dir: str
    model_name_or_path: str | None = None
    adapter_name_or_path: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    dataset: str | None = None
    max_length: int = 1024
    completion_only_loss: bool = True
    learning_rate: float = 2e-5
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int = 0
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 42
    logging_steps: int = 1
    save_steps: int = 500
    save_total_limit: int = 0
    save_model: bool = True
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    resume_from_checkpoint: str | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    gradient_checkpointing: bool = False
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    optimizer: OptimizerName = "adamw"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    anchors: str | None = None
    guard: Mapping[str, Any] = field(default_factory=dict)
    eval_dataset: str | None = None
    probe_dataset: str | None = None
    probe_samples: int = 0
    eval_steps: int = 0
    monitor: Literal["off", "log", "stop", "guard"] = "off"
    monitor_geometry: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            _require(getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in _NOT_NEGATIVE:
            _require(getattr(self, name) >= 0, f"{name} must not be negative")
        _require(
            self.max_steps > 0 or self.num_train_epochs > 0,
            "set max_steps or num_train_epochs to a positive number",
        )
        _require(
            self.optimizer in GUARDED
            or not (self.guard or (self.anchors and self.monitor == "off")),
            f"{self.optimizer} holds no guard, so anchors and guard options would do nothing: set "
            f"optimizer to one of {', '.join(sorted(GUARDED))}, or leave them out",
        )
        _require(
            self.monitor != "guard" or self.optimizer in GUARDED,
            f"monitor guard needs an optimizer with a guard: {', '.join(sorted(GUARDED))}",
        )

    def planned_steps(self, rows: int, rows_per_step: int) -> int:
        """Optimizer steps of a run over ``rows`` rows."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(rows * self.num_train_epochs / rows_per_step)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML."""
        values = dataclasses.asdict(self)
        values["lora_target_modules"] = list(self.lora_target_modules)
        for name in MAPPINGS:
            values[name] = dict(values[name])
        return values


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def from_mapping(values: Mapping[str, Any], source: str = "config") -> TrainConfig:
    """Build a `TrainConfig` from plain values.

    Raises:
        ValueError: A key is unknown, a value has the wrong type, or ``output_dir`` is missing.
    """
    hints = typing.get_type_hints(TrainConfig)
    converted = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{source}: unknown option {name!r}{nearest(name, list(hints))}")
        converted[name] = _convert(name, value, hints[name])
    if not converted.get("output_dir"):
        raise ValueError(f"{source}: set output_dir, the folder the results are written to")
    return TrainConfig(**converted)


def nearest(name: str, known: Sequence[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML mapping.

    Raises:
        ValueError: The file is missing, is not YAML, or is not a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the config {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `option: value` lines, got a {type(values).__name__}")
    return values


def parse_args(argv: Sequence[str], description: str, **defaults: Any) -> TrainConfig:
    """`TrainConfig` from ``--config file.yaml`` and flags; flags win, then YAML, then defaults.

    Guard keywords are given as ``--guard.budget 0.02`` or as a ``guard:`` mapping in the YAML;
    ``optimizer_options`` likewise.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of the options below; flags win over it")
    for item in fields(TrainConfig):
        if item.name not in MAPPINGS:
            default = defaults.get(item.name, item.default)
            shown = "" if default is dataclasses.MISSING else f"default: {default}"
            parser.add_argument(f"--{item.name}", nargs="*", default=None, help=shown)
    known, rest = parser.parse_known_args(list(argv))
    flags = {k: _one(v) for k, v in vars(known).items() if v is not None and k != "config"}
    from_file = load_yaml(known.config) if known.config else {}
    values = {**defaults, **from_file, **flags}
    for name, given in _mapping_flags(rest).items():
        below = values.get(name) or {}
        values[name] = {**below, **given} if isinstance(below, Mapping) else below
    return from_mapping(values, source=known.config or "command line")


def _one(values: list[str]) -> Any:
    # `--use_peft` alone means true; one word is a scalar; several are a list.
    if not values:
        return True
    return values[0] if len(values) == 1 else values


def _mapping_flags(rest: list[str]) -> dict[str, dict[str, Any]]:
    """``--guard.budget 0.02`` and its like, by mapping and keyword."""
    known = [f"--{item.name}" for item in fields(TrainConfig)]
    found: dict[str, dict[str, Any]] = {}
    words = [part for word in rest for part in word.split("=", 1)]
    while words:
        flag = words.pop(0)
        name, dot, keyword = flag.removeprefix("--").partition(".")
        if not (dot and keyword and flag.startswith("--") and name in MAPPINGS):
            raise ValueError(f"unknown option {flag!r}{nearest(flag, known)}")
        if not words:
            raise ValueError(f"{flag} needs a value")
        found.setdefault(name, {})[keyword] = yaml_scalar(words.pop(0))
    return found


def yaml_scalar(text: str) -> Any:
    """A flag's text as YAML reads it, but ``1e-4`` is a number and ``none`` is None."""
    if text in _NONE:
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return yaml.safe_load(text)


def _convert(name: str, value: Any, hint: Any) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or value in _NONE:
            return None
        return _convert(name, value, next(o for o in options if o is not type(None)))
    if origin is Literal:
        if value is False:
            value = next((word for word in _YAML_FALSE if word in options), value)
        _require(value in options, f"{name} must be one of {', '.join(options)}; got {value!r}")
        return value
    if origin is tuple:
        return tuple(value.split(",") if isinstance(value, str) else value)
    if hint in (bool, int, float, str):
        return _scalar(name, value, hint)
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping of keywords; got {value!r}")
    return {k: yaml_scalar(v) if isinstance(v, str) else v for k, v in value.items()}


def _scalar(name: str, value: Any, kind: type) -> Any:
    if kind is bool and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    numeric = kind in (int, float) and isinstance(value, (int, float, str))
    if isinstance(value, bool) or not numeric:
        if isinstance(value, kind):
            return value
    elif kind is float or not isinstance(value, float):
        # PyYAML reads `2e-5` as text, so numbers may arrive as strings.
        try:
            return kind(value)
        except ValueError:
            pass
    raise ValueError(f"{name} must be a {kind.__name__}; got {value!r}")
