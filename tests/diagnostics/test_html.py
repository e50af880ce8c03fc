"""The page as a browser shows it; needs a Chromium on the path."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from safeopt.diagnostics import Pilot, PlannedRun, as_dict, as_markdown, forecast
from safeopt.diagnostics.html import as_html, worst_rows
from safeopt.diagnostics.suggestions import GuardedPilot, suggestions

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = {"light": (1200, 0), "dark": (1200, 1), "phone": (500, 0)}


def pilots(planned: PlannedRun) -> list[Pilot]:
    anchors = 40
    kept = torch.ones(5, anchors, dtype=torch.bool)
    for reading in range(5):
        kept[reading, : 6 * reading] = False
    losses = 0.1 + 1e-3 * torch.arange(5.0)[:, None] ** 2 * (1 + torch.rand(5, anchors))
    steps = torch.linspace(0, planned.effective_steps, 5, dtype=torch.float64)
    chances = kept.float()
    task = torch.tensor([3.0, 2.0, 1.0])
    factor = planned.compression(len(task))
    return [Pilot(planned, factor, steps, losses, kept, chances, 2 * chances - 1, steps, task)]


def guarded(pilot: Pilot) -> GuardedPilot:
    return GuardedPilot(pilot, "SafeAdamW", 0.02)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    planned = PlannedRun(5e-5, 100.0)
    made = pilots(planned)
    found = as_dict(forecast(made), planned, made, guarded=guarded(made[0]))
    estimate = {"value": 0.0213456, "low": 0.011, "high": 0.0299}
    modules = [
        {"layer": layer, "kind": kind, "mass": 0.05, "overlap": 0.01 * layer}
        for layer in range(4)
        for kind in ("self_attn.q_proj", "mlp.down_proj")
    ]
    found["condition"] = {
        "spectrum": [2.0**-i for i in range(16)],
        "null_spectrum": [1.5**-i for i in range(16)],
        "tail": 0.41,
        "null_tail": 0.72,
        "rank": 16,
        **dict.fromkeys(("overlap", "velocity", "coupling", "acceleration"), estimate),
        "expected_overlap": 1e-3,
        "law_window": 12.6,
        "hessian_error": 0.01,
        "modules": modules,
        "row_scores": [0.1, 0.3, -0.2],
    }
    return found | {"rows": ["dull", '<script>alert(1)</script> & "worst"', "good"], "seconds": 3.1}


def test_page_is_whole_without_anything_else(document: dict[str, Any]) -> None:
    page = as_html(document)
    assert page.count("<svg") == page.count('role="img"') == page.count("aria-label") == 4
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("#", "data:")) for link in links), links
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_worst_rows_come_first(document: dict[str, Any]) -> None:
    assert [score for score, _ in worst_rows(document)] == [0.3, 0.1, -0.2]
    assert "worst" in worst_rows(document, 1)[0][1]


def test_page_needs_no_condition() -> None:
    planned = PlannedRun(5e-5, 100.0)
    page = as_html(as_dict(forecast(pilots(planned))))
    assert page.count("<svg") == 1
    assert "Instability" not in page


def test_suggested_rate_is_that_of_the_last_safe_reading() -> None:
    planned = PlannedRun(5e-5, 100.0)
    made = pilots(planned)
    none_safe = as_dict(forecast(made), planned, made)["suggestions"]
    assert "No reading" in none_safe[0]
    lenient = as_dict(forecast(made, tolerance=0.31), planned, made)["suggestions"]
    assert f"{5e-5 * 0.25**0.5:.2g}" in lenient[0]  # the first reading, a quarter of the way
    told = suggestions(forecast(made), planned, guarded(made[0]), [0.1, -0.3, 0.25])
    assert "SafeAdamW and a guard with a budget of 0.02 nats" in told[1]
    assert "lost 60 % (45 to 74 %) of 40 anchors" in told[1]
    assert "row 3 of the 3" in told[2]
    assert "0.25 nats" in told[2]
    assert not as_dict(forecast(made, tolerance=0.9), planned, made)["suggestions"]


def test_exponent_of_a_power_law_is_found() -> None:
    planned = PlannedRun(5e-5, 100.0)
    onset = as_dict(forecast(pilots(planned)), planned, pilots(planned))["onset"]
    assert onset["low"] <= onset["exponent"] <= onset["high"]
    assert onset["exponent"] == pytest.approx(4, abs=0.5)


def test_markdown_tells_the_same(document: dict[str, Any]) -> None:
    text = as_markdown(document)
    assert text.startswith(f"## {document['verdict']}")
    assert "0.021 (0.011 to 0.03)" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 5 + 2


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
@pytest.mark.parametrize("look", WIDTHS)
def test_browser_shows_it_without_errors_or_requests(
    look: str, document: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "report.html").write_text(as_html(document), encoding="utf-8")
    width, dark = WIDTHS[look]
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={tmp_path / 'net.json'}", f"--window-size={width},3000",
            f"--blink-settings=preferredColorScheme={1 - dark}",
            f"--screenshot={tmp_path / 'shot.png'}", (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ":CONSOLE(" not in done.stderr, done.stderr
    events = (tmp_path / "net.json").read_text(encoding="utf-8")
    asked = set(re.findall(r'"url":"([^"]+)"', events))
    own = "google"  # Chromium asks its maker for the time and for news, whatever the page
    assert not {u for u in asked if u.startswith(("http:", "https:")) and own not in u}
    assert (tmp_path / "shot.png").stat().st_size > 50_000
