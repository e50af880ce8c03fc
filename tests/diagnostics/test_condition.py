from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from safeopt.anchors import IGNORED, Anchors
from safeopt.diagnostics import Condition, measure_condition
from safeopt.diagnostics.pilot import mean_nll
from tests import zoo

RATE = 1e-2


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, zoo.VOCABULARY, (rows, 10))
    return {"input_ids": ids, "labels": ids}


def sgd(parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr)


def harmless() -> Anchors:
    ids = [torch.randint(0, zoo.VOCABULARY, (9,)) for _ in range(6)]
    labels = [torch.cat([torch.full((4,), IGNORED), row[4:]]) for row in ids]
    return Anchors.from_tokens(ids, labels)


@pytest.mark.parametrize("make", [zoo.llama, zoo.lora_llama], ids=["full", "lora"])
def test_condition_is_what_dense_algebra_says(make: type) -> None:
    model, anchors = make().double(), zoo.random_anchors()
    drawn = [batch() for _ in range(3)]
    before = [p.detach().clone() for p in model.parameters()]
    found: Condition = measure_condition(
        model, anchors, harmless(), iter(drawn), RATE, probes=3, stride=1.0, optimizer=sgd,
        rows=[batch(1)], compression_rank=None,
    )  # fmt: skip
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())

    trained = [p for p in model.parameters() if p.requires_grad]
    g = zoo.per_example_gradients(model, anchors).matrix()
    u = torch.linalg.svd(g, full_matrices=False).Vh[: found.rank]
    overlaps, slopes, bends = [], [], []
    for rows in drawn:
        with sdpa_kernel(SDPBackend.MATH):
            parts = torch.autograd.grad(mean_nll(model, rows), trained, create_graph=True)
            flat = torch.cat([part.flatten() for part in parts])
            product = torch.autograd.grad(flat @ flat.detach(), trained)
        overlaps.append(float(((u @ flat).norm() / flat.norm()).detach()))
        slopes.append(float((-RATE * g @ flat.detach()).mean()))
        bends.append(float((RATE**2 * g @ torch.cat([h.flatten() for h in product])).mean()))
    mean = torch.tensor([overlaps, slopes, bends]).mean(1).tolist()
    assert found.overlap.value == pytest.approx(mean[0], rel=1e-3)
    assert found.velocity.value == pytest.approx(mean[1], rel=1e-3)
    assert found.coupling.value == pytest.approx(mean[2], rel=0.05)
    torch.testing.assert_close(
        found.spectrum.sum(), g.square().sum() / len(g), rtol=1e-3, atol=0, check_dtype=False
    )
    assert found.expected_overlap == pytest.approx((found.rank / g.shape[1]) ** 0.5)
    assert sum(module.mass for module in found.modules) == pytest.approx(1)
    law = float(found.law.velocity.mean())  # a difference of losses of about 4 in float32
    assert law == pytest.approx(mean[1] - 0.5 * mean[2], rel=0.05, abs=3e-6)
    assert len(found.row_scores) == 1
    assert 0 < found.tail < 1
    assert 0 < found.null_tail < 1
