"""Which optimizer a recipe trains with, and what happens to options that are not its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import safeopt
from safeopt.training import from_mapping, parse_args, train
from safeopt.training.config import GUARDED
from safeopt.training.optimizers import KINDS, build_optimizer, optimizer_options
from tests.training.test_loop import ANCHORS, ROWS

MakeModel = Callable[..., LlamaForCausalLM]

CASES: dict[str, dict[str, Any]] = {
    "adamw": {"adam_beta1": 0.8},
    "safe_adamw": {"optimizer_options": {"amsgrad": True}},
    "sgd": {"optimizer_options": {"momentum": 0.9}},
    "safe_sgd": {"optimizer_options": {"momentum": 0.9, "nesterov": True}},
    "safe_muon": {"optimizer_options": {"ns_steps": 3, "adamw_lr": 1e-3}, "adam_beta2": 0.9},
}


@pytest.fixture
def run(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., Mapping[str, Tensor]]:
    def call(folder: str, optimizer: str, **options: Any) -> Mapping[str, Tensor]:
        values = {"max_steps": 7, "learning_rate": 1e-2, "save_steps": 0, "save_model": False}
        values |= {"progress": False, "weight_decay": 0.1, "per_device_train_batch_size": 4}
        values |= {"output_dir": str(tmp_path / folder), "optimizer": optimizer, **options}
        anchors = safeopt.Anchors.from_rows(ANCHORS, tokenizer) if optimizer in GUARDED else None
        if anchors is not None:
            values["guard"] = {"refresh_every": 3, "budget": 0.02}
        model = make_model(attention_dropout=0.1)
        train(from_mapping(values), model, tokenizer, ROWS, anchors=anchors)
        return {name: p.detach().clone() for name, p in model.state_dict().items()}

    return call


@pytest.mark.parametrize("name", CASES)
def test_each_optimizer_trains_and_resumes_bit_for_bit(
    run: Callable[..., Mapping[str, Tensor]], name: str, tmp_path: Path
) -> None:
    whole = run("whole", name, save_steps=4, **CASES[name])
    again = run(
        "whole",
        name,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"),
        **CASES[name],
    )
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    log = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert ("safety/removed_fraction" in json.loads(log[-1])) == (name in GUARDED)
    assert {"loss", "learning_rate"} <= json.loads(log[-1]).keys()


def test_every_name_is_tried() -> None:
    assert CASES.keys() == KINDS.keys()
    assert {name for name in KINDS if name.startswith("safe_")} == GUARDED


@pytest.mark.parametrize("name", CASES)
def test_options_reach_the_optimizer_and_biases_do_not_decay(
    make_model: MakeModel, name: str
) -> None:
    values = {"output_dir": "out", "optimizer": name, "weight_decay": 0.3, "learning_rate": 0.02}
    config = from_mapping({**values, **CASES[name]})
    model = make_model(attention_bias=True, tie_word_embeddings=False)
    optimizer = build_optimizer(model, config)
    assert type(optimizer) is KINDS[config.optimizer]
    seen = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in seen} == {id(p) for p in model.parameters()}
    assert len(seen) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        for word, value in config.optimizer_options.items():
            assert group.get(word, value) == value
        assert {group["weight_decay"] == 0.3} == {p.ndim == 2 for p in group["params"]}
        if "betas" in group:
            assert group["betas"] == (config.adam_beta1, config.adam_beta2)
        is_rest = group.get("use_muon") is False
        assert group["lr"] == (1e-3 if is_rest else 0.02)
        if group.get("use_muon"):
            assert not {id(model.lm_head.weight), id(model.model.embed_tokens.weight)} & {
                id(p) for p in group["params"]
            }


def test_fp32_moments_and_rounding_are_asked_for_by_their_names(make_model: MakeModel) -> None:
    flags = ["--output_dir", "o", "--optimizer", "safe_adamw", "--dtype", "bfloat16"]
    flags += ["--optimizer_options.rounding", "kahan", "--optimizer_options.moments_dtype=float32"]
    model = make_model().bfloat16()
    optimizer = build_optimizer(model, parse_args(flags, "test"))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in model.parameters():
        state = optimizer.state[p]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        assert state["compensation"].dtype == torch.bfloat16


def test_flags_win_over_yaml_keyword_by_keyword(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "output_dir: o\noptimizer: sgd\noptimizer_options: {momentum: 0.5, nesterov: true}"
    )
    config = parse_args(["--config", str(file), "--optimizer_options.momentum", "0.9"], "test")
    assert optimizer_options(config) == {"momentum": 0.9, "nesterov": True}
    assert from_mapping(config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "safe_lion"}, "one of adamw, safe_adamw, sgd, safe_sgd, safe_muon; got 'sa"),
        ({"optimizer": "safe_sgd", "adam_beta1": 0.8}, "safe_sgd has no adam_beta1: leave it out"),
        ({"optimizer": "sgd", "adam_epsilon": 1e-6}, "sgd has no adam_epsilon: leave it out"),
        ({"optimizer_options": {"momentum": 0.9}}, "adamw has no option 'momentum'; it takes ams"),
        (
            {"optimizer": "sgd", "optimizer_options": {"momentun": 0.9}},
            "'momentun'; did you mean 'momentum'",
        ),
        ({"optimizer_options": {"lr": 1.0}}, "'lr': set learning_rate instead"),
        ({"optimizer_options": {"betas": 1.0}}, "set adam_beta1 and adam_beta2 instead"),
        ({"optimizer_options": {"guard": 1}}, "adamw has no option 'guard'"),
        ({"optimizer_options": 5}, "optimizer_options must be a mapping of keywords; got 5"),
        (
            {"optimizer": "sgd", "optimizer_options": {"nesterov": True}},
            "Nesterov momentum requires a momentum",
        ),
        (
            {"optimizer": "sgd", "optimizer_options": {"momentum": "much"}},
            "sgd does not take these options",
        ),
        (
            {"optimizer_options": {"fused": True, "foreach": True}},
            "adamw does not take these options",
        ),
        ({"optimizer": "safe_sgd"}, "safe_sgd needs anchors"),
        ({"optimizer": "sgd", "guard": {"budget": 0.1}}, "sgd holds no guard, so anchors and"),
        ({"anchors": "anchors.jsonl"}, "adamw holds no guard, so anchors and guard options"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    options: dict[str, Any],
    message: str,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    values = {"output_dir": str(tmp_path / "o"), "max_steps": 1, **options}
    with pytest.raises(ValueError, match=message):
        train(from_mapping(values), make_model(), tokenizer, ROWS)
    assert not (tmp_path / "o").exists()
