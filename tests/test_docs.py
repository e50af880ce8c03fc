"""The documentation: its links lead somewhere, its commands exist, its example trains."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import safeopt
from safeopt.training import parse_args

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str = "") -> list[str]:
    # Every block is read, whatever its language: a closing fence looks like an opening one.
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [body for name, body in found if re.fullmatch(language, name)]


def test_links_in_the_documentation_resolve() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))


@pytest.mark.supports(host="plain loop", feature="full")
def test_the_two_lines_of_the_readme_train(
    make_model: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (diff, *_), (anchors,) = blocks(README, "diff"), blocks(README, "json")
    monkeypatch.chdir(tmp_path)
    Path("anchors.jsonl").write_text(anchors, encoding="utf-8")
    new = "\n".join(line[2:] for line in diff.splitlines() if line.startswith("+"))
    model = make_model()
    names: dict[str, Any] = {"safeopt": safeopt, "model": model, "tokenizer": tokenizer}
    exec(new, names)
    assert isinstance(names["optimizer"], safeopt.SafeAdamW)
    assert names["guard"].anchors.kinds == ("refuse", "comply")
    before = [p.detach().clone() for p in model.parameters()]
    ids = torch.arange(10, 40).view(1, -1)
    model(input_ids=ids, labels=ids).loss.backward()
    names["optimizer"].step()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(changed)
    assert names["guard"].metrics()["safety/removed_fraction"] > 0


@pytest.mark.parametrize("page", ["README.md", "recipes/README.md"])
def test_commands_of_the_recipes_parse(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in blocks(text, "(?:bash)?") for line in block.splitlines()]
    commands = [shlex.split(line)[2:] for line in lines if line.startswith("python recipes/")]
    assert commands
    for arguments in commands:
        assert parse_args(arguments, "").output_dir == "out"
