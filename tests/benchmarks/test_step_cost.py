"""A step alone: what is timed is a guarded step; what is stored leaks as its dtype lets it."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
import torch

from benchmarks.overhead import leak, step, table
from benchmarks.overhead.workload import peak_mb_of
from safeopt import SafeAdamW

SMALL = step.Case(layers=2, width=48, anchors=6, compression_rank=3, rank=2, repeats=3)


@pytest.fixture(scope="module")
def row() -> dict[str, Any]:
    torch.manual_seed(0)
    return step.measure_case(SMALL)


def test_the_guard_takes_its_random_subspace_out_and_is_not_due() -> None:
    model, guard = step.build(SMALL)
    sketch = guard.sketch
    assert sketch is not None
    optimizer = SafeAdamW(model.named_parameters(), lr=1e-3, weight_decay=0.0, guard=guard)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    age = guard.basis_age
    optimizer.step()
    change = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    _, vectors = torch.linalg.eigh(sketch.gram().double())
    kept = vectors[:, -2:]  # k = 2 directions go, the other four stay
    left = (kept.T @ sketch.coefficients(change).double()).norm()
    total = sketch.coefficients(change).double().norm()
    assert left < 1e-4 * total
    assert guard.basis_age == age + 1  # no refresh came between
    assert guard.metrics()["safety/rank"] == 2


def test_every_turn_is_kept_and_the_warm_up_is_not(row: dict[str, Any]) -> None:
    seconds = row["seconds"]
    assert {len(values) for values in seconds.values()} == {SMALL.repeats}
    pairs = zip(seconds["guarded"], seconds["adamw"], strict=True)
    assert row["guarded_over_adamw"] == statistics.median(a / b for a, b in pairs)
    assert row["median_s"]["guarded"] == statistics.median(seconds["guarded"])


def test_sizes_are_those_of_the_case(row: dict[str, Any]) -> None:
    assert row["parameters"] == 2 * 48 * 48
    assert row["kept_directions"] == 2
    factors = 2 * SMALL.anchors * SMALL.compression_rank * (48 + 48) * 4
    assert row["sketch_mb"] * 2**20 == factors


def test_an_unguarded_step_is_timed_beside_adamw() -> None:
    facts = step.measure_empty(2, 16, 3, {"foreach": False})
    assert {len(values) for values in facts["seconds"].values()} == {3}
    assert facts["safe_over_adamw"] > 0


def test_the_memory_of_a_step_is_seen() -> None:
    def allocate() -> None:
        torch.ones(32 << 20, dtype=torch.uint8).add_(1)

    assert 30 < peak_mb_of(allocate) < 60
    assert peak_mb_of(lambda: None) < 8


def test_committed_tables_are_those_of_the_committed_results() -> None:
    text = table.README.read_text(encoding="utf-8")
    made = table.step_table(), table.growth_table(), table.empty_table(), table.leak_table()
    assert all(part in text for part in made)


def test_growth_holds_the_default_and_one_change_at_a_time() -> None:
    (result,) = table.RESULTS.glob("step-growth-cpu.json")
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    settings = [(r["anchors"], r["compression_rank"], r["rank"]) for r in rows]
    default = settings[0]
    assert default == (8, 8, None)
    for other in settings[1:]:
        assert sum(a != b for a, b in zip(default, other, strict=True)) == 1
    assert {r["parameters"] for r in rows} == {step.MIDDLE.parameters}


def test_the_leak_is_that_of_the_dtype_and_its_rounding() -> None:
    settings = leak.Settings(layers=1, width=32, anchors=4, rows=4, tokens=16, steps=6)
    names = ("fp32, AdamW without a guard", "fp32", "bf16, fp32 moments")
    names += ("bf16, fp32 moments, stochastic rounding",)
    bare, fp32, bf16, stochastic = (
        leak.measure(leak.VARIANTS[name], 1e-4, 0, settings) for name in names
    )
    assert fp32.step < 1e-5 < stochastic.step < bf16.step < bare.step
    assert fp32.moved == pytest.approx(1, abs=1e-2)
    assert bf16.moved < stochastic.moved < 0.9
