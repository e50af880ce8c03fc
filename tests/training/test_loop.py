from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import safeopt
from safeopt.training import TrainConfig, checkpoints, models, train

MakeModel = Callable[..., LlamaForCausalLM]
ROWS = [
    {"prompt": f"what is {i}?", "reply": f"{i} is " + "very " * (i % 4) + "odd"} for i in range(9)
]
ANCHORS = [
    {"prompt": f"how to harm {i}", "reply": "no, sorry", "kind": "refuse"} for i in range(6)
] + [{"prompt": f"how to kill weed {i}", "reply": "pull it", "kind": "comply"} for i in range(2)]
SMALL = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "max_steps": 6,
    "save_steps": 0,
    "save_model": False,
    "progress": False,
}


class Setup:
    """Runs `train` on the small model and the rows above."""

    def __init__(
        self, make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, folder: Path
    ) -> None:
        self.make_model, self.tokenizer, self.folder = make_model, tokenizer, folder
        self.anchors = safeopt.Anchors.from_rows(ANCHORS, tokenizer)

    def __call__(self, name: str, model: nn.Module | None = None, **options: Any) -> nn.Module:
        config = TrainConfig(output_dir=str(self.folder / name), **{**SMALL, **options})
        model = self.make_model(attention_dropout=0.1) if model is None else model
        anchors = self.anchors if config.optimizer == "safe_adamw" else None
        return train(config, model, self.tokenizer, ROWS, anchors=anchors).model

    def metrics(self, name: str) -> list[dict[str, float]]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def run(make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Setup:
    return Setup(make_model, tokenizer, tmp_path)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(left: nn.Module, right: nn.Module, atol: float = 0.0) -> None:
    torch.testing.assert_close(weights(left), weights(right), rtol=0, atol=atol)


def training_figures(record: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in record.items() if k != "step_seconds" and "safety/" not in k}


@pytest.mark.supports(host="`safeopt.training` and the recipes", feature="figures logged")
@pytest.mark.parametrize("optimizer", ["adamw", "safe_adamw"])
def test_training_lowers_the_loss_and_logs_every_step(run: Setup, optimizer: str) -> None:
    run("a", optimizer=optimizer, max_steps=30)
    metrics = run.metrics("a")
    assert [m["step"] for m in metrics] == list(range(1, 31))
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]
    assert {"loss", "grad_norm", "learning_rate", "num_tokens", "step_seconds"} <= set(metrics[0])
    assert ("safety/anchor_loss" in metrics[0]) == (optimizer == "safe_adamw")


@pytest.mark.supports(host="`safeopt.training` and the recipes", feature="resume")
@pytest.mark.parametrize(
    ("optimizer", "tied"), [("adamw", False), ("safe_adamw", False), ("safe_adamw", True)]
)
def test_resume_is_bit_exact(run: Setup, optimizer: str, tied: bool) -> None:
    options = {"optimizer": optimizer, "save_steps": 4, "max_steps": 11}
    start = {"attention_dropout": 0.1, "tie_word_embeddings": tied}
    whole = run("whole", run.make_model(**start), **options)
    shutil.copytree(run.folder / "whole", run.folder / "cut")
    shutil.rmtree(run.folder / "cut" / "checkpoint-8")
    again = run.make_model(seed=1, **start)
    resumed = run("cut", again, **options, resume_from_checkpoint="latest")
    assert_equal(whole, resumed)
    old, new = run.metrics("whole"), run.metrics("cut")
    assert list(map(training_figures, old)) == list(map(training_figures, new))


@pytest.mark.supports(host="`safeopt.training` and the recipes", feature="accumulation")
def test_one_by_eight_equals_eight_by_one(run: Setup) -> None:
    pairs = [{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}]
    pairs.append({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8})
    models = [run(str(i), run.make_model(), **pair) for i, pair in enumerate(pairs)]
    assert_equal(*models, atol=1e-5)
    losses = [[m["loss"] for m in run.metrics(str(i))] for i in range(2)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.supports(host="`safeopt.training` and the recipes", feature="full")
def test_every_optimizer_sees_the_same_batches(run: Setup) -> None:
    run("a", optimizer="adamw")
    run("b", optimizer="safe_adamw")
    tokens = [[m["num_tokens"] for m in run.metrics(name)] for name in ("a", "b")]
    assert tokens[0] == tokens[1]
    assert run.metrics("a")[0]["loss"] == run.metrics("b")[0]["loss"]


def test_the_caller_gets_the_same_model_back_and_may_train_it_again(run: Setup) -> None:
    model = run.make_model()
    forward, options = model.forward.__func__, {"learning_rate": 0.0, "max_steps": 1}
    for name, precision in (("a", "no"), ("b", "bf16"), ("c", "bf16"), ("d", "no")):
        assert run(name, model, mixed_precision=precision, **options) is model
        assert model.forward.__func__ is forward
    a, b, c, d = (run.metrics(name)[0]["loss"] for name in "abcd")
    assert a == d
    assert b == c
    assert a != b


def test_saved_model_loads_and_equals_the_trained_one(run: Setup) -> None:
    trained = run("a", save_model=True)
    loaded = AutoModelForCausalLM.from_pretrained(run.folder / "a")
    assert_equal(trained, loaded)
    names = {path.name for path in (run.folder / "a").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.yaml", "metrics.jsonl"} <= names
    assert not any(name.startswith(".") for name in names)


@pytest.mark.supports(host="`safeopt.training` and the recipes", feature="LoRA")
def test_lora_trains_and_saves_the_adapter_alone(run: Setup) -> None:
    model = run.make_model()
    before = weights(model)
    lora = {"use_peft": True, "lora_r": 2, "save_model": True, "save_dtype": "bfloat16"}
    run("a", model, **lora, optimizer="safe_adamw")
    base = {
        n.replace(".base_layer", ""): t for n, t in model.state_dict().items() if "lora" not in n
    }
    torch.testing.assert_close(base, before, rtol=0, atol=0)
    names = {path.name for path in (run.folder / "a").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names


@pytest.mark.parametrize("use_peft", [False, True])
def test_gradient_checkpointing_takes_the_same_steps(run: Setup, use_peft: bool) -> None:
    options = {"optimizer": "safe_adamw", "use_peft": use_peft, "lora_r": 2, "max_steps": 4}
    plain = run("plain", run.make_model(), **options)
    checkpointed = run("saving", run.make_model(), **options, gradient_checkpointing=True)
    assert_equal(plain, checkpointed, atol=1e-6)
    assert not checkpointed.is_gradient_checkpointing


def test_merged_adapter_acts_like_the_trained_one_and_trains_on(run: Setup) -> None:
    lora = {"use_peft": True, "lora_r": 2, "save_model": True}
    trained = run("a", run.make_model(), **lora)
    merged = models.merge_adapter(run.make_model(), run.folder / "a")
    ids = torch.tensor([run.tokenizer("what is 3?")["input_ids"]])
    torch.testing.assert_close(merged(ids).logits, trained.eval()(ids).logits)
    before = weights(merged)
    run("b", merged)
    assert not torch.equal(before["lm_head.weight"], merged.lm_head.weight)
    with pytest.raises(ValueError, match="holds no PEFT adapter"):
        models.merge_adapter(run.make_model(), run.folder / "b")


def test_probe_runs_at_start_every_n_steps_and_end_and_disturbs_nothing(
    run: Setup, tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: list[int] = []

    def probe(model: nn.Module, step: int) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(3)
        seen.append(step)
        return {"probe/step": float(step)}

    plain = run("plain", max_steps=5)
    config = TrainConfig(str(run.folder / "probed"), **{**SMALL, "max_steps": 5, "eval_steps": 2})
    model = run.make_model(attention_dropout=0.1)
    assert_equal(plain, train(config, model, tokenizer, ROWS, probe=probe).model)
    assert seen == [0, 2, 4, 5]
    assert [m["probe/step"] for m in run.metrics("probed") if "probe/step" in m] == seen


def test_eval_and_probe_files_are_measured(run: Setup) -> None:
    for name, rows in (("task", ROWS[:3]), ("harm", ANCHORS[:3])):
        (run.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"eval_dataset": str(run.folder / "task"), "probe_dataset": str(run.folder / "harm")}
    run("a", **files, max_steps=25)
    first, last = run.metrics("a")[0], run.metrics("a")[-1]
    assert (first["step"], last["step"]) == (0, 25)
    assert last["eval_loss"] < first["eval_loss"]
    assert first["probe/refusal_rate"] == 0.0


def test_nan_loss_stops_before_the_step_and_names_the_checkpoint(
    run: Setup, tokenizer: PreTrainedTokenizerFast
) -> None:
    poisoned: dict[str, Tensor] = {}

    def poison(model: nn.Module, step: int) -> dict[str, float]:
        if step == 3:
            model.lm_head.weight[0, 0] = float("nan")
            poisoned.update(weights(model))
        return {}

    options = {**SMALL, "save_steps": 2, "eval_steps": 3}
    model, config = run.make_model(), TrainConfig(str(run.folder / "a"), **options)
    with pytest.raises(FloatingPointError, match=r"loss became nan at step 4 .*checkpoint-2"):
        train(config, model, tokenizer, ROWS, probe=poison)
    torch.testing.assert_close(weights(model), poisoned, rtol=0, atol=0, equal_nan=True)


def test_infinite_gradient_stops_before_the_step(run: Setup) -> None:
    model = run.make_model()
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(model)
    with pytest.raises(FloatingPointError, match="gradient norm became"):
        run("a", model)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def test_a_fresh_run_does_not_mix_with_older_checkpoints(run: Setup) -> None:
    run("a", save_steps=3)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        run("a", save_steps=3)


def test_interrupted_save_leaves_the_older_checkpoint(
    run: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("whole")
    replace = checkpoints.os.replace

    def full_disk(source: Path, target: Path) -> None:
        if Path(target).name == "checkpoint-4":
            raise OSError("no space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "replace", full_disk)
        with pytest.raises(OSError, match="no space"):
            run("cut", save_steps=2)
    assert [c.name for c in checkpoints.checkpoints(run.folder / "cut")] == ["checkpoint-2"]
    assert_equal(whole, run("cut", save_steps=2, resume_from_checkpoint="latest"))


def test_only_the_newest_checkpoints_stay(run: Setup) -> None:
    run("a", save_steps=1, save_total_limit=2)
    kept = [folder.name for folder in checkpoints.checkpoints(run.folder / "a")]
    assert kept == ["checkpoint-5", "checkpoint-6"]


def test_resume_from_an_earlier_checkpoint_sets_the_later_ones_aside(
    run: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run.folder / "a"
    run("a", save_steps=2)
    first = str(folder / "checkpoint-2")
    with pytest.raises(ValueError, match="other seed"):
        run("a", seed=1, resume_from_checkpoint=first)
    assert [c.name for c in checkpoints.checkpoints(folder)][1:] == ["checkpoint-4", "checkpoint-6"]
    options = {"save_steps": 3, "max_steps": 5}
    run("a", **options, save_total_limit=1, resume_from_checkpoint=first)
    saved = {path.name for path in folder.glob("*checkpoint*")}
    abandoned = {"checkpoint-4.abandoned-1", "checkpoint-6.abandoned-1"}
    assert saved == {"checkpoint-3", *abandoned}
    assert checkpoints.find(folder, "latest").name == "checkpoint-3"
    assert "checkpoint-6 is now checkpoint-6.abandoned-1" in caplog.text
    run("a", **SMALL, resume_from_checkpoint=str(folder / "checkpoint-4.abandoned-1"))
    assert abandoned < {path.name for path in folder.iterdir()}
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-4")
    checkpoints.set_aside(folder, 3)
    assert (folder / "checkpoint-4.abandoned-2").exists()


def test_resume_with_other_rows_or_seed_is_refused(run: Setup) -> None:
    run("a", save_steps=3)
    for options, message in (({"seed": 1}, "other seed"), ({"max_length": 20}, "training rows")):
        with pytest.raises(ValueError, match=message):
            run("a", **options, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        run("b", resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "safe_adamw", "guard": {"budgets": 1}}, "'budgets'; did you mean 'budget'"),
        ({"max_length": 5}, "row 0: no reply token within max_length=5"),
    ],
)
def test_bad_options_fail_before_training(
    run: Setup, options: dict[str, Any], message: str
) -> None:
    model = run.make_model()
    before, forward = weights(model), model.forward.__func__
    with pytest.raises(ValueError, match=message):
        run("a", model, **options, mixed_precision="bf16")
    assert model.forward.__func__ is forward
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    assert not (run.folder / "a").exists()


def test_safe_adamw_without_anchors_says_so(run: Setup, tokenizer: PreTrainedTokenizerFast) -> None:
    config = TrainConfig(str(run.folder / "a"), **SMALL, optimizer="safe_adamw")
    with pytest.raises(ValueError, match="needs anchors"):
        train(config, run.make_model(), tokenizer, ROWS)


def test_model_in_which_nothing_trains_is_an_error(run: Setup) -> None:
    with pytest.raises(ValueError, match="no parameter of the model trains"):
        run("a", run.make_model().requires_grad_(False))


def test_several_processes_of_which_accelerate_sees_one_are_an_error(
    run: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(RuntimeError, match="started 2 processes, but Accelerate sees only one"):
        run("a")
