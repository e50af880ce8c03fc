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


def mean_of(terms: torch.Tensor, error: float) -> object:
    """Equal to the mean but for this share of the terms' size: they may cancel."""
    return pytest.approx(float(terms.mean()), rel=0, abs=error * float(terms.abs().mean()))


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
        slopes.append(-RATE * g @ flat.detach())
        bends.append(RATE**2 * g @ torch.cat([h.flatten() for h in product]))
    velocity, coupling = torch.stack(slopes), torch.stack(bends)  # of every batch and anchor
    assert found.overlap.value == pytest.approx(sum(overlaps) / len(overlaps), rel=1e-3)
    assert found.velocity.value == mean_of(velocity, 1e-5)
    assert found.coupling.value == mean_of(coupling, 2e-3)
    torch.testing.assert_close(
        found.spectrum.sum(), g.square().sum() / len(g), rtol=1e-3, atol=0, check_dtype=False
    )
    assert found.expected_overlap == pytest.approx((found.rank / g.shape[1]) ** 0.5)
    assert sum(module.mass for module in found.modules) == pytest.approx(1)
    law = float(found.law.velocity.mean())  # a difference of losses of about 4 in float32
    assert law == pytest.approx(float((velocity - 0.5 * coupling).mean()), rel=0.05, abs=3e-6)
    assert len(found.row_scores) == 1
    assert 0 < found.tail < 1
    assert 0 < found.null_tail < 1
