"""`safeopt measure` and `safeopt inspect passport`, on a saved model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import safeopt
from safeopt import cli
from safeopt.passport import Passport, report


@pytest.fixture
def folder(tokenizer: Any, make_model: Callable[..., Any], tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "little-model")
    tokenizer.save_pretrained(tmp_path / "little-model")
    rows = [{"prompt": f"how to {i}?", "reply": "No, sorry.", "kind": "refuse"} for i in range(6)]
    rows += [{"prompt": "how to bake?", "reply": "Flour first.", "kind": "comply"}] * 2
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "anchors.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def command(folder: Path, *more: str, out: str = "m.passport.safetensors") -> list[str]:
    paths = ["--model", str(folder / "little-model"), "--anchors", str(folder / "anchors.jsonl")]
    return ["measure", *paths, "--out", str(folder / out), *more]


def test_measures_a_file_that_guards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(folder, "--energy", "0.8", "--rank", "5", "--positions", "reply")) == 0
    file = folder / "m.passport.safetensors"
    assert str(file) in capsys.readouterr().out
    passport = Passport.load(file)
    assert passport.header["model"]["name"] == "little-model"  # and not where it lies
    assert str(folder) not in json.dumps(passport.header)
    assert passport.header["anchors"]["refuse"] == 6
    assert passport.header["anchors"]["comply"] == 2
    assert passport.header["certificate"]["probes"] == 1
    method = passport.header["method"]
    assert (method["energy"], method["rank"], method["positions"]) == (0.8, 5, "reply")
    assert max(basis.shape[1] for basis in passport.subspace.bases.values()) == 5
    model = AutoModelForCausalLM.from_pretrained(folder / "little-model")
    guard = safeopt.Guard.from_passport(model, file)
    assert guard.state_dict() == {"passport": passport.digest}
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["anchors.jsonl", "little-model", "m.passport.safetensors"]
    )


def test_shows_it_and_draws_its_spectrum(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    cli.main(command(folder, "--name", "our model"))
    file, picture = folder / "m.passport.safetensors", folder / "spectrum.png"
    capsys.readouterr()
    assert cli.main(["inspect", "passport", str(file), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    passport = Passport.load(file)
    assert "our model" in printed
    assert passport.header["anchors"]["digest"] in printed
    bases = passport.subspace.bases
    ranks = [b.shape[1] for n, b in bases.items() if n.endswith("mlp.down_proj")]
    (line,) = (line for line in printed.splitlines() if "mlp.down_proj" in line)
    low, high = min(ranks), max(ranks)
    assert (f"{low} to {high}" if low < high else str(low)) in line
    assert re.search(r"9[5-9]\.\d %|100\.0 %", line)  # what energy = 0.95 asks for
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["inspect", "passport", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == passport.digest


def test_kinds_hold_the_energy_of_the_bases(folder: Path) -> None:
    cli.main(command(folder, "--energy", "0.7"))
    passport = Passport.load(folder / "m.passport.safetensors")
    found = report.kinds(passport)
    assert sum(len(kind.ranks) for kind in found) == len(passport.subspace.bases)
    for kind in found:
        assert all(0.7 <= held <= 1 + 1e-6 for held in kind.held)
        without = [
            float(e[: rank - 1].sum() / e.sum())
            for e, rank in zip(kind.energies, kind.ranks, strict=True)
        ]
        assert all(share < 0.7 for share in without)


@pytest.mark.parametrize(
    ("options", "out", "message"),
    [
        ([], "nowhere/m.safetensors", "there is no folder"),
        ([], "little-model", "is a folder"),
        ([], "m.bin", r"m\.bin\.passport\.safetensors"),
        (["--anchors", "{folder}/none.jsonl"], "m.safetensors", "pass JSONL rows"),
        (["--energy", "1.5"], "m.safetensors", r"energy must be in \(0, 1\]"),
        (["--held-out", "1"], "m.safetensors", r"held_out must be in \[0, 1\)"),
        (["--rank", "0"], "m.safetensors", "--rank must be at least 1"),
        (["--max-length", "4"], "m.safetensors", "anchors.jsonl:1: .* max_length=4"),
        (["--model", "{folder}/none"], "m.safetensors", "cannot load the model"),
    ],
)
def test_errors_say_what_to_pass_and_write_nothing(
    options: list[str],
    out: str,
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = set(folder.rglob("*"))
    filled = [option.format(folder=folder) for option in options]
    assert cli.main(command(folder, *filled, out=out)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("safeopt: ")
    assert re.search(message, error), error
    assert set(folder.rglob("*")) == before


def test_a_write_that_breaks_off_leaves_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(command(folder))
    file = folder / "m.passport.safetensors"
    before, names = file.read_bytes(), sorted(p.name for p in folder.iterdir())

    def full_disk(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    assert cli.main(command(folder, "--energy", "0.5")) == 2
    assert "No space left" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == names


def test_inspecting_what_is_no_passport(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = folder / "little-model" / "model.safetensors"
    assert cli.main(["inspect", "passport", str(weights)]) == 2
    assert "`safeopt measure` makes one" in capsys.readouterr().err
    cli.main(command(folder))
    file = str(folder / "m.passport.safetensors")
    assert cli.main(["inspect", "passport", file, "--plot", str(folder / "s.xyz")]) == 2
    assert "xyz" in capsys.readouterr().err
    assert not list(folder.glob("*s.xyz*"))


def test_the_picture_has_a_line_for_every_basis(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot as plt

    cli.main(command(folder))
    passport = Passport.load(folder / "m.passport.safetensors")
    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", figures.append)
    report.draw(passport, folder / "s.svg")
    lines = [line for line in figures[0].axes[0].lines if len(line.get_xdata()) > 1]
    assert len(lines) == len(passport.subspace.bases)
    drawn = torch.tensor(lines[0].get_ydata())
    assert any(torch.equal(drawn, e) for e in passport.subspace.energies.values())


def test_says_where_the_limit_of_directions_cuts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(command(folder, "--rank", "2"))
    found = report.kinds(Passport.load(folder / "m.passport.safetensors"))
    shares = [share for kind in found for share in kind.held]
    short = [share for share in shares if share < 0.95]
    assert f"{len(short)} of {len(shares)} bases reached --rank 2" in capsys.readouterr().out
    cli.main(command(folder))
    assert "reached --rank" not in capsys.readouterr().out
