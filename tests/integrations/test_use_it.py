"""README's diffs: both sides train, and the new side's guard acts."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import Dataset

import safeopt
from tests.distributed.jobs import whole
from tests.integrations import hosts

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## Use it in your script")[1].split("\n## ")[0]
DIFFS = dict(
    re.findall(r"^\*\*(.+?)\*\*.*?\n```diff\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
)
STEPS = 3


def side(diff: str, sign: str) -> str:
    lines = [line for line in diff.splitlines() if line[:1] in (" ", sign)]
    return "\n".join(line[2:] for line in lines)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """The group of a script that `torchrun` started as one process."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def names(
    make_model: Callable[..., Any],
    tokenizer: Any,
    mesh: DeviceMesh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """What the diffs take for granted: a script that trains already."""
    monkeypatch.chdir(tmp_path)
    for state in (PartialState, AcceleratorState):
        state._reset_state()
    rows = [{"kind": "refuse", "prompt": f"harm {i}", "reply": "no"} for i in range(4)]
    ids = torch.randint(5, len(tokenizer), (STEPS * 4, 10)).tolist()
    tokens = [{"input_ids": i, "attention_mask": [1] * 10, "labels": i} for i in ids]
    options = {**hosts.trainer_options(tmp_path), "max_steps": STEPS, "learning_rate": 2e-5}
    texts = Dataset.from_list([{"prompt": f"{i}?", "completion": "x"} for i in range(STEPS * 4)])
    return {
        "torch": torch,
        "lightning": lightning,
        "safeopt": safeopt,
        "Trainer": Trainer,
        "SFTTrainer": SFTTrainer,
        "model": make_model().train(),
        "tokenizer": tokenizer,
        "anchors": safeopt.Anchors.from_rows(rows, tokenizer),
        "rows": tokens,
        "texts": texts,
        "args": TrainingArguments(**options),
        "sft_args": SFTConfig(**options, bf16=False, max_length=32),
        "lora": LoraConfig(r=2, target_modules="all-linear"),
        "accelerator": Accelerator(cpu=True),  # after the arguments, which reset its state
        "fully_shard": functools.partial(fully_shard, mesh=mesh),
        "loader": DataLoader(tokens, batch_size=4, collate_fn=default_data_collator),  # type: ignore
    }


def test_every_host_of_the_section_is_here() -> None:
    assert set(DIFFS) == {"Accelerate", "fully_shard", "Trainer", "SFTTrainer", "Lightning"}


@pytest.mark.parametrize("sign", ["-", "+"])
@pytest.mark.parametrize("host", DIFFS)
def test_the_diff_trains_before_and_after(host: str, sign: str, names: dict[str, Any]) -> None:
    before = {name: p.detach().clone() for name, p in names["model"].named_parameters()}
    exec(side(DIFFS[host], sign), names)
    after = {name.replace(".base_layer", ""): p for name, p in names["model"].named_parameters()}
    moved = [name for name in before if not torch.equal(before[name], whole(after[name]))]
    assert bool(moved) == (host != "SFTTrainer")  # there an adapter trains
    assert ("guard" in names) == (sign == "+")
    if sign == "+":
        assert names["guard"].metrics()["safety/basis_age"] >= 1
        assert names["guard"].metrics()["safety/removed_fraction"] > 0


@pytest.mark.parametrize("host", DIFFS)
def test_a_host_asks_for_three_new_lines(host: str) -> None:
    added = [line for line in DIFFS[host].splitlines() if line.startswith("+")]
    assert 1 <= len(added) <= 3
