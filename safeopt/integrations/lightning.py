"""Lightning: a callback that logs the guard and keeps it in the checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from safeopt.guard import Guard
from safeopt.layouts import FSDP1, ZERO
from safeopt.passport.guard import PassportGuard


class GuardCallback(Callback):
    """Logs a guard's figures and keeps its state in Lightning's checkpoints.

    The optimizer itself needs nothing: return a `safeopt.SafeAdamW` that holds the guard from
    ``configure_optimizers``. Lightning runs forward and backward inside the closure that it
    passes to ``step``; the guard acts after that.

    Args:
        guard: a guard of the language model inside the module, which ``configure_optimizers``
            hands to the optimizer.

    Raises:
        ValueError: when a run with DeepSpeed or FSDP1 is set up.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[GuardCallback(guard)])
    """

    def __init__(self, guard: Guard | PassportGuard) -> None:
        self.guard = guard
        self._logged = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that flatten parameters."""
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(ZERO)
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(f"{FSDP1}; Lightning's ModelParallelStrategy is FSDP2")

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the figures of a step that was taken; micro-batches in between have none."""
        if trainer.global_step != self._logged:
            self._logged = trainer.global_step
            pl_module.log_dict(self.guard.metrics())

    def state_dict(self) -> dict[str, Any]:
        """The guard's state, for the checkpoint."""
        return self.guard.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was taken."""
        self.guard.load_state_dict(state_dict)
