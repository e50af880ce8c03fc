from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from safeopt import Anchors, cli
from safeopt.diagnostics import Verdict, read_anchors
from safeopt.training import TrainConfig, train
from safeopt.training.diagnose import diagnose, learning_rates

REFUSALS = [{"prompt": f"harm {i:02}", "reply": "no, sorry", "kind": "refuse"} for i in range(36)]
TASK = [{"prompt": f"add {i}", "reply": "yes, all of it"} for i in range(8)]


@pytest.fixture(scope="module")
def aligned(
    make_model: Callable, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> nn.Module:
    """A small model that refuses, made by training on refusals."""
    config = TrainConfig(
        output_dir=str(tmp_path_factory.mktemp("align")),
        learning_rate=1e-2,
        max_steps=60,
        save_steps=0,
        save_model=False,
    )
    model: nn.Module = make_model()
    train(config, model, tokenizer, REFUSALS)
    return model


def config(**changes: Any) -> TrainConfig:
    options = {"learning_rate": 1e-2, "max_steps": 40, "per_device_train_batch_size": 4}
    return TrainConfig(**({"output_dir": "."} | options | changes))


def anchors(tokenizer: Any) -> Anchors:
    kept = {"prompt": "add 1", "reply": "two", "kind": "comply"}
    return Anchors.from_rows([*REFUSALS, kept], tokenizer)


def ask(model: nn.Module, tokenizer: Any, plan: TrainConfig, **options: Any) -> Any:
    options = {"opening": 4} | options
    return diagnose(plan, model, tokenizer, TASK, anchors=anchors(tokenizer), **options)


def test_a_run_that_breaks_refusals_is_told_from_one_that_does_not(
    aligned: nn.Module, tokenizer: Any, tmp_path: Path
) -> None:
    harsh, gentle = config(), config(learning_rate=1e-6)
    told = ask(aligned, tokenizer, harsh, pilot_steps=16)
    assert told.forecast.verdict is Verdict.NO_GO
    assert told.anchors == len(REFUSALS)
    spared = ask(aligned, tokenizer, gentle, pilot_steps=16, condition=False)
    assert spared.forecast.verdict is Verdict.GO
    assert spared.guarded is None
    assert told.guarded is not None
    assert told.guarded.optimizer == "SafeAdamW"
    assert told.guarded.lost().total == len(REFUSALS) // 2
    assert told.guarded.lost().value < float(told.forecast.lost[-1])

    outcomes = {}
    for name, plan in (("harsh", harsh), ("gentle", gentle)):
        model = copy.deepcopy(aligned)
        where = replace(plan, output_dir=str(tmp_path / name), save_model=False, save_steps=0)
        train(where, model, tokenizer, TASK)
        outcomes[name] = read_anchors(model, anchors(tokenizer).of_kind("refuse"))
    assert not outcomes["harsh"].kept.any()
    assert outcomes["gentle"].kept.all()


def test_replies_are_judged_unless_openings_are_asked_for(
    aligned: nn.Module, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--opening 4"):  # "no, sorry" is no refusal to the matcher
        ask(aligned, tokenizer, config(), pilot_steps=4, condition=False, opening=None)
    monkeypatch.setattr("safeopt.evaluation.anchored.is_refusal", lambda reply: "sor" in reply)
    plan = config(mixed_precision="bf16")
    told = ask(aligned, tokenizer, plan, pilot_steps=16, condition=False, opening=None)
    assert told.forecast.verdict is Verdict.NO_GO
    assert told.document()["read_by"] == "greedy replies of 24 tokens, judged"
    assert aligned.config._attn_implementation == "sdpa"


def test_pilots_run_in_the_precision_of_the_run(aligned: nn.Module, tokenizer: Any) -> None:
    forward = aligned.forward
    plain, mixed = (
        ask(
            aligned, tokenizer, config(mixed_precision=precision), pilot_steps=4, condition=False
        ).pilots
        for precision in ("no", "bf16")
    )
    assert not torch.equal(plain[0].losses[0], mixed[0].losses[0])
    torch.testing.assert_close(plain[0].losses[0], mixed[0].losses[0], rtol=0.1, atol=0.02)
    assert aligned.forward == forward


def test_gradient_checkpointing_is_undone(aligned: nn.Module, tokenizer: Any) -> None:
    plan = config(gradient_checkpointing=True)
    ask(aligned, tokenizer, plan, pilot_steps=4, condition=False)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in aligned.modules())
    with pytest.raises(ValueError, match="--opening 4"):
        ask(aligned, tokenizer, plan, pilot_steps=4, condition=False, opening=None)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in aligned.modules())


def test_rates_are_those_of_the_schedule() -> None:
    rates = learning_rates(config(learning_rate=2.0, warmup_steps=2, max_steps=6), 6)
    assert rates == pytest.approx([0.0, 1.0, 2.0, 1.5, 1.0, 0.5])


def test_command_writes_reports_and_speaks_by_exit_code(
    aligned: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aligned.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, rows in (("anchors", REFUSALS), ("rows", TASK)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = ["diagnose", "--model", str(tmp_path / "model"), "--pilot-steps", "8"]
    command += ["--opening", "4"]
    command += ["--dataset", str(tmp_path / "rows.jsonl"), "--steps", "20", "--lr"]
    command += ["1e-2", "--anchors", str(tmp_path / "anchors.jsonl")]
    assert cli.main([*command, "--report", str(tmp_path / "out"), "--json"]) == 3
    facts = json.loads(capsys.readouterr().out)
    assert facts["verdict"] == "NO-GO"
    assert facts["steps"] == 20
    assert json.loads((tmp_path / "out/report.json").read_text())["curve"] == facts["curve"]
    assert facts["condition"]["overlap"]["low"] <= facts["condition"]["overlap"]["value"]
    assert facts["guarded"]["low"] <= facts["guarded"]["lost"] <= facts["guarded"]["high"]
    assert any("SafeAdamW" in advice for advice in facts["suggestions"])
    assert set(facts["stages"]) == {
        "pilots", "cheap predictors", "guarded pilot", "condition",
    }  # fmt: skip
    assert facts["onset"]["low"] <= facts["onset"]["exponent"] <= facts["onset"]["high"]
    assert len(facts["rows"]) == len(facts["condition"]["row_scores"])
    assert any("rate" in advice for advice in facts["suggestions"])
    assert (tmp_path / "out/report.md").read_text().startswith("## NO-GO")
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<svg") == page.count('role="img"') == page.count("aria-label") == 4
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "<script" not in page
    assert cli.main([*command, "--learning_rat", "1"]) == 2
    assert "learning_rate" in capsys.readouterr().err


def test_bad_input_is_named(aligned: nn.Module, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="pilot_steps must be at least 1"):
        diagnose(config(), aligned, tokenizer, TASK, pilot_steps=0)
    with pytest.raises(ValueError, match="needs anchors"):
        diagnose(config(), aligned, tokenizer, TASK)
    with pytest.raises(ValueError, match="set dataset"):
        diagnose(config(), aligned, tokenizer, anchors=anchors(tokenizer))
    comply = Anchors.from_rows([{"prompt": "a", "reply": "b", "kind": "comply"}], tokenizer)
    with pytest.raises(ValueError, match="refuse"):
        diagnose(config(), aligned, tokenizer, TASK, anchors=comply)
    with pytest.raises(ValueError, match="above 0"):
        diagnose(config(learning_rate=0.0), aligned, tokenizer, TASK, anchors=anchors(tokenizer))


def monitored(aligned: nn.Module, tokenizer: Any, where: Path, **changes: Any) -> Any:
    plan = config(output_dir=str(where), save_steps=0, save_model=False, eval_steps=5, **changes)
    model = copy.deepcopy(aligned)
    result = train(plan, model, tokenizer, TASK, anchors=Anchors.from_rows(REFUSALS, tokenizer))
    kept = read_anchors(model, anchors(tokenizer).of_kind("refuse")).kept
    lines = (where / "metrics.jsonl").read_text().splitlines()
    return result.steps, float(kept.float().mean()), [json.loads(line) for line in lines]


def test_monitor_logs_stops_and_guards(aligned: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    steps, kept, log = monitored(aligned, tokenizer, tmp_path / "log", monitor="log")
    assert (steps, kept) == (40, 0.0)
    told = [line for line in log if "safety/forecast_lost" in line]
    assert [line["step"] for line in told] == list(range(0, 41, 5))
    assert told[0]["safety/lost"] == 0.0
    assert told[-1]["safety/lost"] == told[-1]["safety/forecast_lost"] == 1.0
    assert all(0 <= line["safety/overlap"] <= 1 for line in told[1:])
    assert all(line["safety/coupling_error"] < 0.1 for line in told[1:])
    for earlier, later in itertools.pairwise(told):
        rise = 5 * later["safety/velocity"]
        assert later["safety/loss"] - earlier["safety/loss"] == pytest.approx(rise)

    steps, _, log = monitored(aligned, tokenizer, tmp_path / "stop", monitor="stop")
    assert steps < 40
    assert log[-1]["safety/forecast_low"] > 0.1
    assert all(line.get("safety/forecast_low", 0) <= 0.1 for line in log[:-1])

    options = {"optimizer": "safe_adamw", "monitor": "guard", "guard": {"refresh_every": 1}}
    steps, kept, log = monitored(aligned, tokenizer, tmp_path / "guard", **options)
    assert steps == 40
    assert kept > 0.9


def test_a_guard_that_the_monitor_took_on_survives_a_resume(
    aligned: nn.Module, tokenizer: Any, tmp_path: Path
) -> None:
    plan = config(
        optimizer="safe_adamw",
        monitor="guard",
        guard={"refresh_every": 1},
        eval_steps=5,
        save_steps=20,
        output_dir=str(tmp_path),
    )
    own = Anchors.from_rows(REFUSALS, tokenizer)
    whole, resumed = copy.deepcopy(aligned), copy.deepcopy(aligned)
    train(plan, whole, tokenizer, TASK, anchors=own)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    taken_on = [
        line["step"] for line in map(json.loads, lines) if line.get("safety/forecast_low", 0) > 0.1
    ]
    assert 0 < taken_on[0] < 20
    again = replace(plan, resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    train(again, resumed, tokenizer, TASK, anchors=own)
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_monitor_needs_anchors_and_something_to_guard(make_model: Callable, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="with a guard"):
        config(monitor="guard")
    with pytest.raises(ValueError, match="eval_steps"):
        train(config(monitor="log"), make_model(), tokenizer, TASK)
