from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from safeopt.training import checkpoints, from_mapping

ROOT = Path(__file__).parents[2]
ROWS = [
    {"prompt": f"what is {i}?", "reply": "it is " + "very " * (i % 3) + "odd"} for i in range(9)
]
ANCHORS = [{"prompt": f"how to harm {i}", "reply": "no, sorry", "kind": "refuse"} for i in range(8)]


def launcher(name: str) -> list[str]:
    """``accelerate launch`` with a shipped launch file, in full precision."""
    file = str(ROOT / "recipes/accelerate" / name)
    launch = ["-m", "accelerate.commands.launch", "--config_file", file]
    return [*launch, "--mixed_precision", "no"]


def literally(*flags: str) -> list[str]:
    """``accelerate launch FLAGS``, as somebody types it."""
    return ["-m", "accelerate.commands.accelerate_cli", "launch", *flags]


TWO_PROCESSES = literally("--multi_gpu", "--num_processes", "2")


class Recipe:
    """Runs a recipe script as a user does, on a small model in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, rows: list[dict[str, str]]) -> str:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def start(
        self,
        name: str,
        *flags: str,
        script: str = "sft",
        launched_by: list[str] | None = None,
        **env: str,
    ) -> subprocess.Popen[str]:
        model, out = str(self.folder / "model"), str(self.folder / name)
        command = [sys.executable, *(launched_by or []), str(ROOT / "recipes" / f"{script}.py")]
        command += ["--model_name_or_path", model, "--output_dir", out, "--progress", "false"]
        command += ["--dataset", self.write("rows.jsonl", ROWS), "--learning_rate", "1e-3", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe)

    def __call__(self, *args: str, **kwargs: object) -> tuple[int, str]:
        process = self.start(*args, **kwargs)  # type: ignore[arg-type]
        out, err = process.communicate(timeout=200)
        return process.returncode, out + err


@pytest.fixture
def recipe(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Recipe:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return Recipe(tmp_path)


@pytest.mark.trap("ux 0.1")
@pytest.mark.multi
@pytest.mark.parametrize(
    ("optimizer", "by_one", "by_two"),
    [
        ("adamw", launcher("single.yaml"), launcher("ddp.yaml")),
        ("safe_adamw", [], TWO_PROCESSES),
    ],
)
def test_two_processes_take_the_steps_of_one(
    recipe: Recipe, optimizer: str, by_one: list[str], by_two: list[str]
) -> None:
    flags = ["--optimizer", optimizer, "--max_steps", "6"]
    if optimizer == "safe_adamw":
        flags += ["--anchors", recipe.write("anchors.jsonl", ANCHORS), "--guard.refresh_every", "2"]
    cpu = {"ACCELERATE_USE_CPU": "true"}
    rows = "--per_device_train_batch_size"
    one = recipe("one", *flags, rows, "4", launched_by=by_one, **cpu)
    accumulate = ["--gradient_accumulation_steps", "2"]
    two = recipe("two", *flags, rows, "1", *accumulate, launched_by=by_two, **cpu)
    assert (one[0], two[0]) == (0, 0), one[1] + two[1]
    left, right = (load_file(recipe.folder / name / "model.safetensors") for name in ("one", "two"))
    assert_close(left, right, rtol=0, atol=1e-5)
    logs = [(recipe.folder / name / "metrics.jsonl").read_text() for name in ("one", "two")]
    tokens = [[json.loads(line)["num_tokens"] for line in log.splitlines()] for log in logs]
    assert tokens[0] == tokens[1]  # both saw four rows a step


@pytest.mark.trap("ux 0.1")
@pytest.mark.multi
@pytest.mark.parametrize(
    "launched_by", [launcher("ddp.yaml"), TWO_PROCESSES], ids=["yaml", "flags"]
)
def test_processes_that_do_not_see_each_other_stop_with_the_right_command(
    recipe: Recipe, launched_by: list[str]
) -> None:
    no_gpu = {"launched_by": launched_by, "CUDA_VISIBLE_DEVICES": ""}
    code, text = recipe("out", "--max_steps", "2", **no_gpu)
    assert code != 0
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in text
    assert not (recipe.folder / "out").exists()


def test_a_run_killed_while_it_saves_resumes_from_a_whole_checkpoint(recipe: Recipe) -> None:
    flags = ["--max_steps", "60", "--save_steps", "1", "--save_total_limit", "2"]
    process = recipe.start("cut", *flags)
    out, deadline = recipe.folder / "cut", time.monotonic() + 120
    while not list(out.glob(".checkpoint-*.tmp/model.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.communicate()
    last = checkpoints.checkpoints(out)
    assert not last or (last[-1] / "optimizer.bin").exists()
    code, text = recipe("cut", *flags, *(["--resume_from_checkpoint", "latest"] if last else []))
    assert code == 0, text
    assert recipe("whole", *flags)[0] == 0
    left, right = (load_file(recipe.folder / n / "model.safetensors") for n in ("cut", "whole"))
    assert_close(left, right, rtol=0, atol=0)


def test_align_makes_a_lora_adapter_and_wants_both_kinds(recipe: Recipe) -> None:
    rows = [{**row, "kind": "comply"} for row in ROWS] + ANCHORS
    both, one = recipe.write("both.jsonl", rows), recipe.write("one.jsonl", ANCHORS)
    flags = ["--config", str(ROOT / "recipes/configs/align.yaml"), "--max_steps", "2"]
    flags += ["--mixed_precision", "no"]
    code, text = recipe("a", *flags, "--dataset", both, script="align")
    assert code == 0, text
    assert (recipe.folder / "a" / "adapter_model.safetensors").exists()
    code, text = recipe("b", *flags, "--dataset", one, script="align")
    assert code == 2
    assert 'error: no row has "kind": "comply"' in text


def test_unknown_flag_is_one_sentence_and_exit_code_2(recipe: Recipe) -> None:
    code, text = recipe("out", "--learning_rat", "1")
    assert code == 2
    # Packages that transformers imports when they are installed may have had their say before.
    last = text.strip().splitlines()[-1]
    assert last == "error: unknown option '--learning_rat'; did you mean '--learning_rate'?"
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes/configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_shipped_configs_hold_known_options(path: Path) -> None:
    from_mapping({"output_dir": "out", **yaml.safe_load(path.read_text())}, source=path.name)
