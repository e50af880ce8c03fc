"""bf16 products on a CPU without bf16 instructions."""

from __future__ import annotations

import pytest
import torch

from benchmarks.collapse.products import WORTH_ROWS, WidenedProducts

ULP = 2.0**-8  # of bf16, relative


@pytest.mark.parametrize("rows", [1, WORTH_ROWS - 1, WORTH_ROWS, 3 * WORTH_ROWS + 1])
@pytest.mark.parametrize("batched", [False, True])
def test_widened_products_are_those_of_bf16_to_a_rounding(rows: int, batched: bool) -> None:
    batch = (3,) if batched else ()
    left = torch.randn(*batch, rows, 70).bfloat16()
    right = torch.randn(*batch, 70, 40).bfloat16()
    exact = left.double() @ right.double()
    with WidenedProducts():
        found = left @ right
    assert found.dtype == torch.bfloat16
    scale = left.double().abs() @ right.double().abs()
    assert ((found.double() - exact).abs() <= ULP * exact.abs() + 1e-6 * scale).all()


def test_other_products_are_left_alone() -> None:
    left, right = torch.randn(50, 30), torch.randn(30, 20)
    half, other = left.half(), right.half()
    expected = left @ right, half @ other
    with WidenedProducts():
        found = left @ right, half @ other
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_training_step_under_autocast_has_the_gradients_of_emulated_products() -> None:
    layer, inputs = torch.nn.Linear(48, 24), torch.randn(2 * WORTH_ROWS, 48)

    def gradients() -> list[torch.Tensor]:
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(inputs).square().mean()
        loss.backward()
        return [p.grad.clone() for p in layer.parameters() if p.grad is not None]

    expected = gradients()
    with WidenedProducts():
        found = gradients()
    assert len(found) == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * ULP, atol=2 * ULP * float(b.abs().max()))
