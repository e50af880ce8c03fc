"""The CPU benchmarks: every way takes the same step, and another revision really steps."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import cpu_variants, paired
from safeopt_kernels import native

WAYS = [name for name in cpu_variants.VARIANTS if name != cpu_variants.BASE]


@pytest.mark.parametrize("name", [name for name in WAYS if not name.startswith("compiled")])
def test_every_way_takes_the_same_step(name: str) -> None:
    obstacle = native.obstacle([]) if name.startswith(cpu_variants.NATIVE) else None
    if obstacle is not None:
        pytest.skip(f"no native kernels here: {obstacle}")
    torch.manual_seed(0)
    problem = cpu_variants.Problem.random(2, 48, 3, 2)
    problem.weights = torch.tensor([1e-3, -2e-3, 3e-3], dtype=torch.float64)
    truth = copy.deepcopy(problem)
    before = [p.double() for p in problem.p]
    c = cpu_variants.VARIANTS[name](problem)
    cpu_variants.fused(truth)
    expected = torch.zeros(3, dtype=torch.float64)
    is_narrow = "bf16" in name
    for i, moved in enumerate(truth.p):
        left, right = truth.left[i].double(), truth.right[i].double()
        expected += ((left @ (moved.double() - before[i])) * right).sum((1, 2))
        removed = ((left * truth.weights[:, None, None]).mT @ right).sum(0)
        found = problem.p[i].double() - moved.double()
        worst = float((found + removed).abs().max() / removed.abs().max())
        assert worst < (2e-2 if is_narrow else 1e-3), name
        torch.testing.assert_close(problem.m[i], truth.m[i], rtol=1e-6, atol=1e-7)
    assert c is not None
    assert float((c - expected).norm() / expected.norm()) < (2e-2 if is_narrow else 1e-3)


@pytest.mark.slow
def test_a_worker_steps_with_the_package_of_its_folder(tmp_path: Path) -> None:
    arguments = ["--layers", "1", "--width", "32", "--threads", "1", "--repeats", "1"]
    output = tmp_path / "result.json"
    assert paired.main(["--revision", "HEAD", *arguments, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["parameters"] == 32**2
    assert all(value > 0 for times in result["seconds"].values() for value in times)
