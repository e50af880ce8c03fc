"""Lightning beyond the trajectory: closures, accumulation, checkpoints, figures, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

import safeopt
from safeopt.integrations.lightning import GuardCallback
from tests.integrations import hosts, loops


class Watched(hosts.Module):
    """Counts closures and notes whether gradients were there when the guard acted."""

    def __init__(self, model: nn.Module, guard: safeopt.Guard) -> None:
        super().__init__(model, guard)
        self.closures, self.logged = 0, []  # type: ignore[var-annotated]

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.closures += 1
        return super().training_step(batch, index)

    def on_train_batch_end(self, *args: Any) -> None:
        self.logged.append(dict(self.trainer.callback_metrics))


class ByIndex(Watched):
    """Takes rows by the batch's index: resumed within an epoch, a loader starts at the front."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return super().training_step(list(loops.loader())[index], index)


def fit(
    folder: Path,
    steps: int,
    *,
    size: int = 4,
    kind: str = "full",
    ckpt: Path | None = None,
    module: type[Watched] = Watched,
    **options: Any,
) -> tuple[Watched, loops.CountingGuard]:
    model = loops.make_model(kind)
    guard = loops.make_guard(model)
    trained = module(model.train(), guard)
    callbacks = [GuardCallback(guard), *options.pop("callbacks", [])]
    trainer = hosts.lightning_trainer(folder, max_steps=steps, callbacks=callbacks, **options)
    trainer.fit(trained, loops.loader(size), ckpt_path=ckpt, weights_only=True)
    return trained, guard


@pytest.mark.trap("ux 0.8")
def test_the_closure_runs_once_a_step(tmp_path: Path) -> None:
    module, guard = fit(tmp_path, 5)
    assert module.closures == 5
    assert guard.metrics()["safety/basis_age"] == 5
    assert guard.refreshes == 1


@pytest.mark.supports(host="Lightning", feature="accumulation")
def test_accumulated_micro_batches_take_the_steps_of_whole_ones(tmp_path: Path) -> None:
    whole, _ = fit(tmp_path, 5)
    parts, guard = fit(tmp_path, 5, size=1, accumulate_grad_batches=4)
    assert parts.closures == 20
    assert guard.metrics()["safety/basis_age"] == 5
    torch.testing.assert_close(
        loops.weights(parts.model), loops.weights(whole.model), rtol=0, atol=1e-6
    )


@pytest.mark.supports(host="Lightning", feature="resume")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resume_is_bit_exact_across_a_refresh(kind: str, tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    options = {"kind": kind, "module": ByIndex}
    whole, _ = fit(tmp_path, 14, **options, callbacks=[save], enable_checkpointing=True)
    resumed, guard = fit(tmp_path, 14, **options, ckpt=tmp_path / "step=7.ckpt")
    assert resumed.closures == 7
    assert guard.refreshes == 1
    torch.testing.assert_close(
        loops.weights(resumed.model), loops.weights(whole.model), rtol=0, atol=0
    )


@pytest.mark.supports(host="Lightning", feature="figures logged")
def test_figures_are_logged_once_a_step(tmp_path: Path) -> None:
    module, guard = fit(tmp_path, 3, size=2, accumulate_grad_batches=2)
    ages = [logged.get("safety/basis_age") for logged in module.logged]
    assert [None if age is None else float(age) for age in ages] == [None, 1, 1, 2, 2, 3]
    assert set(guard.metrics()) <= set(module.logged[-1])


def test_fsdp1_is_refused(tmp_path: Path) -> None:
    guard = loops.make_guard(loops.make_model("full"))

    class OnFsdp:
        strategy = FSDPStrategy()

    with pytest.raises(ValueError, match="ModelParallelStrategy is FSDP2"):
        GuardCallback(guard).setup(OnFsdp(), None, "fit")  # type: ignore[arg-type]
