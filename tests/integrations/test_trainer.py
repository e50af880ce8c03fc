"""Trainer and SFTTrainer beyond the trajectory: names, decay groups, accumulation, resume, logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import schedulefree
import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import Dataset

import safeopt
from safeopt.geometry.input_subspace import InputSubspace
from safeopt.integrations.transformers import GuardCallback, SafeAdamWFactory, decay_groups
from safeopt.passport.guard import PassportGuard
from tests.distributed.ranks import run_ranks
from tests.integrations import hosts, loops
from tests.zoo import gpt2, llama, lora_llama, random_anchors


def fresh(kind: str = "full") -> tuple[nn.Module, safeopt.Guard]:
    model = loops.make_model(kind)
    return model, loops.make_guard(model)


@pytest.mark.multi
@pytest.mark.supports(host="Trainer, DDP x 2", feature="full")
@pytest.mark.supports(host="Trainer, DDP x 2", feature="resume")
def test_two_processes_take_the_steps_of_a_plain_loop_and_resume(tmp_path: Path) -> None:
    expected, _ = loops.run(loops.plain, "full", tmp_path)
    for whole, resumed in run_ranks(2, hosts.trainer_and_resumed, "full", tmp_path):
        torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.trap("optimizers 0.15", "ux 0.9", "ux 2.2.4")
@pytest.mark.parametrize("make", [llama, gpt2, lora_llama])
def test_the_factory_makes_the_decay_groups_of_trainer_with_names(
    make: Any, tmp_path: Path
) -> None:
    model = make()
    arguments = TrainingArguments(**hosts.trainer_options(tmp_path), weight_decay=0.1)
    theirs = Trainer(model, arguments).create_optimizer().param_groups
    ours = safeopt.SafeAdamW(decay_groups(model, 0.1), lr=1e-3).param_groups
    theirs = [group for group in theirs if group["params"]]
    assert [g["weight_decay"] for g in ours] == [g["weight_decay"] for g in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert list(map(id, mine["params"])) == list(map(id, other["params"]))
        names = {id(p): name for name, p in model.named_parameters()}
        assert mine["param_names"] == [names[id(p)] for p in mine["params"]]


@pytest.mark.trap("ux 0.10")
def test_the_factory_asks_for_the_learning_rate_that_trainer_does_not_pass(tmp_path: Path) -> None:
    model, guard = fresh()
    trainer = hosts.make_trainer(model, guard, tmp_path)
    trainer.optimizer_cls_and_kwargs = (SafeAdamWFactory, {"guard": guard})
    with pytest.raises(ValueError, match="does not hand learning_rate to an optimizer factory"):
        trainer.train()


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: schedulefree.AdamWScheduleFree(groups, lr=1e-3),
        lambda groups: bitsandbytes.optim.AdamW8bit(groups, lr=1e-3, min_8bit_size=256),
    ],
    ids=["schedule-free", "8 bit"],
)
def test_any_guarded_optimizer_trains_and_resumes(make: Any, tmp_path: Path) -> None:
    trained = []
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "max_grad_norm": 0.0}
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model = loops.make_model("full").float()
        guard = loops.make_guard(model)
        trainer = hosts.make_trainer(model, guard, tmp_path, **options)
        trainer.optimizer_cls_and_kwargs = None
        trainer.optimizer = safeopt.guarded(make(loops.decayed(model)), guard)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert guard.metrics()["safety/removed_fraction"] > 0
        trained.append(loops.weights(model))
    torch.testing.assert_close(*trained, rtol=0, atol=1e-6)


@pytest.mark.trap("optimizers 5.1.9")
@pytest.mark.parametrize("way", ["class", "instance", "guarded"])
def test_the_other_ways_into_trainer_take_the_same_steps(way: str, tmp_path: Path) -> None:
    weights = []
    for name in ("factory", way):
        model, guard = fresh()
        trainer = hosts.make_trainer(model, guard, tmp_path, max_steps=4, weight_decay=0.01)
        if name == "class":
            options = {"guard": guard, "lr": 1e-3, "eps": 1e-5}
            trainer.optimizer_cls_and_kwargs = (safeopt.SafeAdamW, options)
        elif name == "instance":
            trainer.optimizer_cls_and_kwargs = None
            groups = loops.decayed(model)
            trainer.optimizer = safeopt.SafeAdamW(groups, **loops.OPTIONS, guard=guard)
        trainer.train()
        weights.append(loops.weights(model))
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.supports(host="Trainer", feature="accumulation")
def test_accumulated_micro_batches_take_the_steps_of_whole_ones(tmp_path: Path) -> None:
    weights = []
    for size in (4, 1):
        model, guard = fresh()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        hosts.make_trainer(model, guard, tmp_path, max_steps=6, **options).train()
        weights.append(loops.weights(model))
        assert guard.metrics()["safety/basis_age"] == 6
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


@pytest.mark.trap("optimizers 5.1.9")
@pytest.mark.supports(host="Trainer", feature="resume")
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("where", ["here", "moved"])
def test_resume_is_bit_exact_across_a_refresh(kind: str, where: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 7, "lr_scheduler_type": "cosine"}
    whole, guard = fresh(kind)
    hosts.make_trainer(whole, guard, tmp_path / "a", **options).train()
    checkpoint = tmp_path / "a" / "checkpoint-7"
    assert not list(checkpoint.glob(".*"))
    if where == "moved":
        checkpoint = checkpoint.rename(tmp_path / "elsewhere")
    resumed, guard_again = fresh(kind)
    trainer = hosts.make_trainer(resumed, guard_again, tmp_path / "a", **options)
    if where == "moved":
        trainer.pop_callback(GuardCallback)
        trainer.add_callback(GuardCallback(guard_again, resume_from=checkpoint))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(loops.weights(resumed), loops.weights(whole), rtol=0, atol=0)
    left, right = guard.metrics(), guard_again.metrics()
    timeless = [name for name in left if not name.endswith("_ms")]
    assert {name: left[name] for name in timeless} == {name: right[name] for name in timeless}


def test_a_checkpoint_without_its_guard_is_not_resumed(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    hosts.make_trainer(*fresh(), tmp_path / "a", **options).train()
    (tmp_path / "a" / "checkpoint-2" / "guard.pt").unlink()
    trainer = hosts.make_trainer(*fresh(), tmp_path / "a", **options)
    with pytest.raises(ValueError, match=r"there is no .*checkpoint-2/guard.pt: that checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_a_checkpoint_of_another_run_is_not_mistaken_for_ours(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    hosts.make_trainer(*fresh(), tmp_path / "a", **options).train()
    hosts.make_trainer(*fresh("lora"), tmp_path / "b", **options).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    trainer = hosts.make_trainer(*fresh(), tmp_path / "b", **options)
    with pytest.raises(ValueError, match=r"resumed at step 2, but not from .*/b/checkpoint-2"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_thresholds_are_those_of_the_precision_that_trains(tmp_path: Path) -> None:
    model = llama(pad_token_id=0)
    guard = safeopt.Guard(model, random_anchors(8))
    before = guard.thresholds.clone()
    hosts.make_trainer(model, guard, tmp_path, max_steps=1, bf16=True, learning_rate=0.0).train()
    assert not torch.equal(guard.thresholds, before)
    torch.testing.assert_close(guard.thresholds, before, rtol=0, atol=0.05)


def test_a_passport_guard_trains_resumes_and_logs(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5}
    trained = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model = loops.make_model("full")
        with torch.random.fork_rng():
            torch.manual_seed(2)
            subspace = InputSubspace.measure(model, random_anchors(3), energy=0.8)
        guard = PassportGuard(model, subspace.pieces())
        trainer = hosts.make_trainer(model, guard, tmp_path, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.log_history[-2]["safety/removed_fraction"] > 0
        trained.append(loops.weights(model))
    torch.testing.assert_close(*trained, rtol=0, atol=0)


class Tracker(TrainerCallback):
    """Stands where W&B or TensorBoard stand: among the callbacks that Trainer adds itself."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(set(logs))


@pytest.mark.supports(host="Trainer", feature="figures logged")
def test_figures_reach_the_log_history_and_every_tracker(tmp_path: Path) -> None:
    model, guard = fresh()
    late, early = Tracker(), Tracker()
    trainer = hosts.make_trainer(model, guard, tmp_path, late, max_steps=3)
    trainer.callback_handler.callbacks.insert(0, early)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, GuardCallback))
    callback.report_first(trainer)
    trainer.train()
    expected = set(guard.metrics())
    assert {"safety/anchor_loss", "safety/leak", "safety/removed_fraction"} <= expected
    for tracker in (early, late):
        assert all(expected <= logs for logs in tracker.seen[:3])
    history = trainer.state.log_history
    assert [h["safety/basis_age"] for h in history[:3]] == [1, 2, 3]
    assert not any(name.startswith("safety/") for name in history[-1])  # the run's summary


@pytest.mark.supports(host="SFTTrainer", feature="resume")
@pytest.mark.supports(host="SFTTrainer", feature="accumulation")
def test_sft_trainer_accumulates_and_resumes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    options = {"save_strategy": "steps", "save_steps": 7, "max_steps": 14}
    trained = []
    for size, checkpoint in ((4, None), (4, str(tmp_path / "checkpoint-7")), (1, None)):
        model, guard = fresh()
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        folder = tmp_path if size == 4 else tmp_path / "parts"
        trainer = hosts.make_sft_trainer(model, guard, folder, tokenizer, **options, **sizes)
        trainer.train(resume_from_checkpoint=checkpoint)
        trained.append(loops.weights(model))
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=0)
    torch.testing.assert_close(trained[2], trained[0], rtol=0, atol=1e-6)


@pytest.mark.supports(host="SFTTrainer", feature="figures logged")
def test_sft_trainer_makes_the_adapter_itself_and_checkpoints_activations(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=128)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"kind": "refuse", "prompt": f"harm {i}", "reply": "no"} for i in range(4)]
    anchors = safeopt.Anchors.from_rows(rows, tokenizer)
    guard = safeopt.Guard(model, anchors, refresh_every=2, budget=-0.5)
    options = {**hosts.trainer_options(tmp_path), "max_steps": 4, "bf16": False}
    trainer = SFTTrainer(
        model,  # type: ignore[arg-type]
        SFTConfig(**options, max_length=64),
        train_dataset=Dataset.from_list([{"prompt": f"{i}?", "completion": "x"} for i in range(8)]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        optimizer_cls_and_kwargs=(SafeAdamWFactory, {"lr": 1e-2, "guard": guard}),
        callbacks=[GuardCallback(guard)],
    )
    assert trainer.args.activation_checkpointing
    trainer.train()
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in trained)
    assert [h["safety/basis_age"] for h in trainer.state.log_history[:3]] == [1, 1, 2]
    assert guard.sketch is not None
    assert len(guard.sketch.blocks) == len(trained)
    assert guard.metrics()["safety/removed_fraction"] > 0
    for name, p in model.named_parameters():
        if "lora" not in name:
            assert torch.equal(p.detach(), before[name.replace(".base_layer", "")])


def test_adapters_of_prompts_are_refused(tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    base = llama()
    guard = safeopt.Guard(base, random_anchors())
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="not in the guard's model"):
        SafeAdamWFactory()(get_peft_model(base, config), lr=1e-3, guard=guard)
