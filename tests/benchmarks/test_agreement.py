"""Agreement of two halves' passports, on anchors whose halves are known to agree or not."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.collapse.agreement import agreement_table, measure, principal_cosines
from safeopt import Anchors
from tests import zoo


def test_cosines_of_two_planes_that_share_a_line() -> None:
    angle = 0.3 + torch.rand(()).item()
    turned = torch.tensor([[1.0, 0, 0], [0, math.cos(angle), math.sin(angle)]]).T
    rotation = torch.linalg.qr(torch.randn(2, 2)).Q
    cosines = principal_cosines(torch.eye(3)[:, :2], turned @ rotation)
    torch.testing.assert_close(cosines, torch.tensor([1.0, math.cos(angle)]))


def suite(anchors: Anchors) -> Any:
    model = zoo.tied_llama()
    return SimpleNamespace(model=lambda: model, anchors=lambda task: anchors)


def test_halves_of_the_same_anchors_agree_and_random_bases_do_not() -> None:
    half = zoo.random_anchors(count=4)
    twice = Anchors(*(tuple(x for x in f for _ in (0, 1)) for f in vars(half).values()))
    result = measure(suite(twice), "task", {"energy": 0.8}, seed=0)
    assert result["anchors"] == [4, 4]
    for name, entry in result["halves"].items():
        assert min(entry["cosines"]) > 0.999, name
        assert len(entry["cosines"]) == min(entry["ranks"]) <= entry["width"]
    (rows,) = result["rows"]
    assert rows["rows"] == [rows["common"]] * 2
    assert result["captured"]["own half"] == pytest.approx(result["captured"]["other half"])
    assert result["captured"]["random bases"] < result["captured"]["own half"] - 0.1
    angles = agreement_table(result).splitlines()[2].split("|")
    assert angles[4].strip() == "1.00"
    assert float(angles[6]) < 0.95


def test_halves_of_different_anchors_differ() -> None:
    result = measure(suite(zoo.random_anchors(count=8)), "task", {"energy": 0.5}, seed=0)
    assert min(c for e in result["halves"].values() for c in e["cosines"]) < 0.9
    assert result["captured"]["other half"] < result["captured"]["own half"]
