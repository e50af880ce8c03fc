from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.overhead import memory, table
from benchmarks.overhead.guard import Settings, measure
from benchmarks.overhead.workload import Workload
from safeopt import Anchors

SETTINGS = Settings(rows=2, tokens=24, anchors=4, repeats=2, lr=1e-3)


@pytest.fixture(scope="module")
def workload(make_model: Callable[..., Any]) -> Workload:
    model = make_model(tie_word_embeddings=True, hidden_size=64)
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    batch = torch.randint(5, vocabulary, (SETTINGS.rows, SETTINGS.tokens), generator=draw)
    ids = [torch.randint(5, vocabulary, (20 + i,), generator=draw) for i in range(4)]
    labels = [torch.cat([torch.full((6,), -100), row[6:]]) for row in ids]
    return Workload(model, batch, Anchors.from_tokens(ids, labels))


@pytest.fixture(scope="module")
def result(workload: Workload) -> dict[str, Any]:
    return measure(workload, SETTINGS)


def test_every_repeat_is_kept_and_the_warm_up_is_not(result: dict[str, Any]) -> None:
    assert {len(values) for values in result["seconds"].values()} == {SETTINGS.repeats}
    assert all(value > 0 for values in result["seconds"].values() for value in values)


def test_ratios_follow_from_the_seconds(result: dict[str, Any]) -> None:
    seconds = result["seconds"]
    ratios = [
        mine / plain
        for mine, plain in zip(seconds["refresh"], seconds["anchor_forward_backward"], strict=True)
    ]
    middle = sum(ratios) / 2  # the median of two
    assert result["summary"]["refresh_over_anchor_forward_backward"] == pytest.approx(middle)


def test_compression_errors_fall_with_the_rank(result: dict[str, Any]) -> None:
    errors = result["compression"]
    assert [e["compression_rank"] for e in errors] == [1, 2, 4, 8, 16, None]
    for name in ("lost_energy", "gram_error", "tangent_error", "velocity_left"):
        values = [e[name] for e in errors]
        assert values[0] > values[3] > values[4]
        assert abs(values[-1]) < 1e-4
    assert errors[0]["sketch_bytes"] < errors[3]["sketch_bytes"] < errors[-1]["sketch_bytes"]


def test_measuring_the_step_leaves_the_weights_alone(workload: Workload) -> None:
    from benchmarks.overhead.compression import adamw_step

    before = [p.detach().clone() for p in workload.model.parameters()]
    step = adamw_step(workload, lr=1e-3)
    assert min(float(delta.norm()) for delta in step.values()) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, workload.model.parameters(), strict=True))


def test_bytes_from_shapes_need_no_weights() -> None:
    model = memory.llama_3_1_8b()
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248
    small, large = (memory.from_shapes(model, 8, 512, rank) for rank in (8, None))
    assert 0 < small.sketch_bytes < large.sketch_bytes
    assert small.share_of_bf16_weights == 2 * small.share_of_fp32_weights


def test_tables_are_written_from_the_result(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    page = tmp_path / "README.md"
    page.write_text(table.README.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(table, "README", page)
    stored = tmp_path / "result.json"
    stored.write_text(json.dumps(result | {"command": "made in a test"}), encoding="utf-8")
    table.main([str(stored)])
    text = page.read_text(encoding="utf-8")
    assert "made in a test" in text
    assert f"{result['summary']['refresh_over_anchor_forward_backward']:.2f} |" in text


def test_measuring_is_timed_and_larger_files_follow_from_ranks() -> None:
    from benchmarks.overhead import passport

    row = passport.measure_case(passport.Case(64, 2, 4, tokens=12, repeats=2))
    assert set(map(len, row["cpu_seconds"].values())) == {2}
    assert row["parameters"] * 4 == pytest.approx(row["weights_mb"] * 2**20)
    capped = passport._at_8b({"mlp.down_proj": 10, "self_attn.q_proj": 20, "lm_head": 5})
    assert capped["file_bytes"] == 2 * (32 * (10 * 14336 + 20 * 4096) + 5 * 4096)
    assert capped["share_of_fp32_weights"] < 0.001
