from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safeopt import cli


@pytest.fixture
def saved_model(tokenizer: Any, make_model: Callable, tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_env_is_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"]
    assert cli.main(["env"]) == 0
    assert f"torch: {facts['versions']['torch']}" in capsys.readouterr().out


def test_python_m_safeopt() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "safeopt", "env", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["python"]


def test_evaluate(saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write(tmp_path / "mine.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    rows = write(tmp_path / "task.jsonl", {"prompt": "1 + 1", "reply": "2"})
    command = ["evaluate", str(saved_model), "--prompts", prompts, "--rows", rows, "--limit", "2"]
    command += ["--max-new-tokens", "4", "--transcripts", str(tmp_path / "t.jsonl")]
    assert cli.main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["refusals"]["mine"]["total"] == 2
    assert facts["nll"]["task"] > 0
    assert len((tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "mine" in printed
    assert f"{facts['nll']['task']:.4f}" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "no-such-set"], "no-such-set"),
        (["--prompts", "{prompts}", "--limit", "0"], "--limit"),
        (["--prompts", "{broken}"], "broken.jsonl:1"),
        (["--prompts", "{prompts}", "--max-new-tokens", "0"], "at least 1"),
        (["--prompts", "{prompts}", "--dtype", "float33"], "float33"),
        (["--prompts", "{prompts}", "--adapter", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    options: list[str],
    message: str,
    saved_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {
        "prompts": write(tmp_path / "prompts.jsonl", {"prompt": "a"}),
        "broken": write(tmp_path / "broken.jsonl", {"question": "a"}),
    }
    filled = [option.format(**files) for option in options]
    assert cli.main(["evaluate", str(saved_model), *filled]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("safeopt: ")
    assert message in error


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "a"})
    assert cli.main(["evaluate", str(tmp_path), "--prompts", prompts]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeopt.training.diagnose.diagnose", lambda *_, **__: pytest.fail("ran"))
    command = ["diagnose", "--model", "m", "--dataset", "d", "--optimizer", "adamw", "--report"]
    (tmp_path / "file").touch()
    assert cli.main([*command, str(tmp_path / "file")]) == 2
    assert "File exists" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "safeopt.diagnostics.html", None)
    assert cli.main([*command, str(tmp_path / "folder")]) == 2
    assert "pip install" in capsys.readouterr().err
