"""kill -9 at random points: a run loses the steps since its last checkpoint and nothing else."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from safeopt.training import checkpoints, from_mapping, train

ROWS = [{"prompt": f"what is {i}?", "reply": f"it is {i}"} for i in range(9)]
ANCHORS = [{"prompt": f"how to harm {i}", "reply": "no, sorry"} for i in range(4)]
KILLS, STEPS, SAVE_STEPS = 20, 130, 2

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["accelerate", "transformers.models.llama.modeling_llama"])


def child(values: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    train(from_mapping(values))


class Run:
    """A run in a process of its own, which goes on from its newest checkpoint when started anew."""

    def __init__(self, values: dict[str, Any], out: Path) -> None:
        self.values, self.out = {**values, "output_dir": str(out)}, out

    def start(self) -> Any:
        resume = {"resume_from_checkpoint": "latest"} if self.saved() else {}
        process = _CONTEXT.Process(target=child, args=({**self.values, **resume},))
        process.start()
        return process

    def finish(self) -> Any:
        process = self.start()
        process.join(200)
        assert process.exitcode == 0
        return load_file(self.out / "model.safetensors")

    def saved(self) -> int:
        found = checkpoints.checkpoints(self.out)
        return int(found[-1].name.removeprefix("checkpoint-")) if found else 0

    def logged(self) -> int:
        log = self.out / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def half_written(self) -> list[Path]:
        return list(self.out.glob(".checkpoint-*.tmp"))

    def kill(self, when: Callable[[], bool], delay: float) -> None:
        """SIGKILL ``delay`` seconds after ``when()`` has become true."""
        process, deadline = self.start(), time.monotonic() + 60
        while not when():
            assert process.exitcode is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(2e-4)
        time.sleep(delay)
        process.kill()
        process.join()
        assert process.exitcode == -9


@pytest.fixture
def options(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> dict[str, Any]:
    make_model(attention_dropout=0.1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, rows in (("rows", ROWS), ("anchors", ANCHORS)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset": str(tmp_path / "rows"),
        "anchors": str(tmp_path / "anchors"),
        "optimizer": "safe_adamw",
        "guard": {"refresh_every": 3, "anchors_per_refresh": 2, "budget": -0.1},
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "progress": False,
    }


@pytest.mark.slow
@pytest.mark.multi
def test_twenty_kills_cost_only_the_steps_since_the_last_checkpoint(
    options: dict[str, Any], tmp_path: Path
) -> None:
    whole, cut = Run(options, tmp_path / "whole"), Run(options, tmp_path / "cut")
    expected = whole.finish()
    seed = random.randrange(1 << 30)
    draw, torn = random.Random(seed), 0
    for kill in range(KILLS):
        start, before = cut.logged(), cut.saved()
        if kill % 2:  # somewhere in a save
            leftover = {path: path.stat().st_ino for path in cut.half_written()}
            cut.kill(lambda old=leftover: is_saving(cut, old), draw.uniform(0, 0.01))
        else:  # somewhere in the first steps, or before them
            steps = draw.randint(0, 5)
            cut.kill(lambda goal=before + steps: cut.logged() >= goal, draw.uniform(0, 0.1))
        torn += bool(cut.half_written())
        for folder in checkpoints.checkpoints(cut.out):  # a torn one would not be whole
            checkpoints.read_state(folder)
            load_file(folder / "model.safetensors")
            assert torch.load(folder / "optimizer.bin", weights_only=True)
        lost = cut.logged() - cut.saved()
        assert cut.saved() >= before, f"a checkpoint went, seed {seed}"
        assert lost <= SAVE_STEPS or cut.logged() <= start, f"{lost} steps lost, seed {seed}"
    assert torn, f"no kill hit a save, seed {seed}"
    assert 0 < cut.saved() < STEPS
    torch.testing.assert_close(cut.finish(), expected, rtol=0, atol=0)
    records = [json.loads(line) for line in (cut.out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert not cut.half_written()


def is_saving(run: Run, leftover: dict[Path, int]) -> bool:
    """A half-written checkpoint is there that no earlier kill has left."""
    try:
        return any(leftover.get(path) != path.stat().st_ino for path in run.half_written())
    except FileNotFoundError:  # it has just been given its final name
        return False
