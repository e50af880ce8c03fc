from __future__ import annotations

import json
from pathlib import Path

import pytest

from safeopt.files import whole_folder, write_json, write_jsonl, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep/target"
    with whole_folder(target) as scratch:
        (scratch / "file").write_text("x")
        assert not target.exists()
    assert names(target) == ["file"]
    assert names(target.parent) == ["target"]


def test_an_interrupted_folder_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_folder(tmp_path / "target") as scratch:
            (scratch / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with whole_folder(target) as second:
        (second / "file").write_text("second")
        with whole_folder(target) as first:
            (first / "file").write_text("first")
    assert (target / "file").read_text() == "first"
    assert names(tmp_path) == ["target"]


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"word": "naïve"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"word": "naïve"}
    with pytest.raises(TypeError):
        write_jsonl(path, [{"fine": 1}, {"bad": object()}])
    assert json.loads(path.read_text(encoding="utf-8")) == {"word": "naïve"}
    write_text(path, "text")
    assert path.read_text() == "text"
    assert names(tmp_path) == ["a.json"]
