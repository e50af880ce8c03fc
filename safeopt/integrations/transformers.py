"""transformers' Trainer and those built on it, TRL's among them: optimizer factory, callback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from safeopt.guard import Guard
from safeopt.integrations.accelerate import refuse_unsupported
from safeopt.optim import SafeAdamW
from safeopt.passport.guard import PassportGuard

GUARD_FILE = "guard.pt"


class SafeAdamWFactory:
    """Makes the `SafeAdamW` of a Trainer: ``optimizer_cls_and_kwargs=(SafeAdamWFactory, {...})``.

    Trainer calls an optimizer *class* with nameless parameters. A *factory* is called with the
    model, so names stay and the guard sees what trains. A factory gets nothing of the training
    arguments, so learning rate, betas, eps and weight decay go into the keywords.

    Example:
        >>> guard = safeopt.Guard(model, anchors, budget=0.02)
        >>> trainer = Trainer(
        ...     model,
        ...     args,
        ...     train_dataset=rows,
        ...     optimizer_cls_and_kwargs=(SafeAdamWFactory, {"lr": 2e-5, "guard": guard}),
        ...     callbacks=[GuardCallback(guard)],
        ... )
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float | None = None,
        guard: Guard | PassportGuard | None = None,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> SafeAdamW:
        """Build the optimizer; called by the Trainer.

        Args:
            model: the Trainer's model.
            lr: peak learning rate; ``learning_rate`` of the training arguments is not seen here.
            guard: the guard of this model, built before or after PEFT wrapped it.
            weight_decay: of all parameters but biases and norms, as in Trainer.
            options: further keywords of `SafeAdamW`.

        Raises:
            ValueError: no learning rate, a parameter that is not in the guard's model, or a
                Trainer that runs DeepSpeed or FSDP1.
        """
        if lr is None:
            raise ValueError(
                "Trainer does not hand learning_rate to an optimizer factory; pass "
                'optimizer_cls_and_kwargs=(SafeAdamWFactory, {"lr": ..., "guard": guard})'
            )
        if guard is not None and AcceleratorState._shared_state:
            refuse_unsupported(AcceleratorState())
        groups = decay_groups(model, weight_decay)
        return SafeAdamW(groups, lr=lr, weight_decay=weight_decay, guard=guard, **options)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainer's two parameter groups with their names: those that decay, and biases and norms.

    Args:
        model: the Trainer's model.
        weight_decay: of the first group; the second has none.
    """
    # The method uses nothing of its Trainer, and the factory is not given one.
    decays = set(Trainer.get_decay_parameter_names(cast(Trainer, None), cast(Any, model)))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [x for x in trained if x[0] in decays], "weight_decay": weight_decay},
        {"params": [x for x in trained if x[0] not in decays], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class GuardCallback(TrainerCallback):
    """Logs a guard's figures and keeps its state in the Trainer's checkpoints.

    The figures join every log of a training loss, and ``trainer.state.log_history``. The state
    is written as ``checkpoint-N/guard.pt`` and read back when the Trainer resumes; without it
    the thresholds would be measured on weights that have already drifted. In mixed precision,
    which the Trainer sets up after the guard was built, they are measured again at the start.

    Args:
        guard: the guard that the optimizer holds.
        resume_from: checkpoint folder, for a resume from outside ``output_dir`` that
            ``args.resume_from_checkpoint`` does not name.

    Raises:
        ValueError: at the start of a resumed run, if the checkpoint holds no guard or cannot be
            found.
    """

    def __init__(
        self, guard: Guard | PassportGuard, resume_from: str | os.PathLike[str] | None = None
    ) -> None:
        self.guard = guard
        self.resume_from = resume_from

    def report_first(self, trainer: Trainer) -> None:
        """Move to the front of the Trainer's callbacks.

        A Trainer puts the callbacks of ``report_to`` (W&B, TensorBoard and so on) before those
        that it is given, so they would log before the guard's figures have been added.
        """
        trainer.remove_callback(self)
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the guard's state when the Trainer has resumed."""
        mixed = args.bf16 or args.fp16
        if state.global_step == 0 and mixed and isinstance(self.guard, Guard):
            self.guard.recalibrate()
        if state.global_step > 0:
            path = self._resumed_folder(args, state) / GUARD_FILE
            if not path.exists():
                raise ValueError(
                    f"there is no {path}: that checkpoint was saved without GuardCallback, or the "
                    "run was killed while saving; resume from another one"
                )
            self.guard.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _resumed_folder(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The checkpoint that the Trainer has resumed from; callbacks are not told."""
        default = _checkpoint_folder(args, state)
        named = [self.resume_from, args.resume_from_checkpoint, default]
        folders = [Path(folder) for folder in named if isinstance(folder, (str, os.PathLike))]
        for folder in folders:
            path = folder / TRAINER_STATE_NAME
            if path.exists():
                saved = TrainerState.load_from_json(str(path))
                if json.dumps(saved.log_history) == json.dumps(state.log_history):
                    return folder
        raise ValueError(
            f"the run resumed at step {state.global_step}, but not from {default}; name the folder "
            "with GuardCallback(guard, resume_from=...)"
        )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the guard's state into the checkpoint that was just saved."""
        saved, folder = self.guard.state_dict(), _checkpoint_folder(args, state)
        if state.is_world_process_zero:
            torch.save(saved, folder / f".{GUARD_FILE}.tmp")
            os.replace(folder / f".{GUARD_FILE}.tmp", folder / GUARD_FILE)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the guard's figures to a log of the training loss."""
        if logs is None or "loss" not in logs:
            return
        figures = self.guard.metrics()
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
