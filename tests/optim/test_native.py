"""SafeAdamW's guarded step in C++ against its reference, on CPUs that have what it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import safeopt
from safeopt.optim.listed import takes_lists
from safeopt.optim.storage import Precision
from safeopt_kernels import native
from tests.optim.listed import MOVES, TOLERANCE, assert_same, pair, step_both
from tests.zoo import ARCHITECTURES, llama, random_anchors, take_training_step

pytestmark = pytest.mark.usefixtures("native_kernels")


@pytest.mark.parametrize("name", ["llama", "tied-llama", "gpt2", "lora-llama"])
def test_native_steps_are_the_reference(name: str) -> None:
    optimizers = pair(ARCHITECTURES[name]())
    step_both(optimizers)
    assert_same(optimizers, **TOLERANCE)


@pytest.mark.parametrize("guard", MOVES, ids=str)
def test_every_native_move_is_the_reference(guard: dict[str, Any]) -> None:
    optimizers = pair(guard=guard)
    step_both(optimizers)
    assert_same(optimizers, **TOLERANCE)


class Wide(nn.Module):
    """An embedding that does not train and two matrices of a million weights."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(16, 1024))
        self.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(2))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        x = self.table[input_ids]
        for layer in self.layers:
            x = x + layer(x)
        return x[..., :16]


def leak(mode: str, monkeypatch: pytest.MonkeyPatch, told: float = 1e-5) -> float:
    """Leak of a first step that wants to go where the anchors do, measured in float64.

    The gradient is that of the anchors, so that there is much to be taken out. The guard's own
    figure has to agree to ``told``.
    """
    monkeypatch.setenv("SAFEOPT_KERNELS", mode)
    torch.manual_seed(3)
    model = Wide()
    rows = torch.randint(0, 16, (4, 9)).tolist()
    guard = safeopt.Guard(model, safeopt.Anchors.from_tokens(rows, rows), anchors_per_refresh=4)
    guard.refresh()
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-4, weight_decay=0.1, guard=guard)
    assert takes_lists(optimizer, guard, Precision()) == (mode == "native")
    rows_of_g, before = [], []
    for name, p in model.named_parameters():
        (block,) = guard.frame.sketch.blocks[name]
        dense = torch.einsum("nqr,nqc->nrc", block.left.double(), block.right.double())
        rows_of_g.append(dense.flatten(1))
        p.grad = (dense.sum(0) + 0.1 * dense.std() * torch.randn_like(p)).float()
        before.append(p.detach().double())
    optimizer.step()
    moved = [(p.double() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]
    change, g = torch.cat(moved).detach(), torch.cat(rows_of_g, 1)
    basis = torch.linalg.qr(g.T).Q
    assert guard.metrics()["safety/removed_fraction"] > 0.1
    assert guard.metrics()["safety/leak"] == pytest.approx(
        float((basis.T @ change).norm() / change.norm()), abs=told
    )
    return float((basis.T @ change).norm() / change.norm())


def test_it_leaks_as_little_as_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert leak("native", monkeypatch) <= 1e-5
    assert leak("reference", monkeypatch) <= 1e-5


@pytest.mark.usefixtures("matmul_precision")
def test_where_torch_may_round_products_it_leaks_what_rounding_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_float32_matmul_precision("medium")
    rounding = 2.0**-11  # the guard measures with such products too
    assert leak("native", monkeypatch, told=rounding) <= rounding
    assert leak("reference", monkeypatch, told=rounding) <= rounding


# -- who takes which way -----------------------------------------------------------------------


def test_the_automatic_choice_is_native_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEOPT_KERNELS", "auto")
    small, _ = pair()
    assert small.guard is not None
    assert not takes_lists(small, small.guard, Precision())
    model = Wide()
    rows = torch.randint(0, 16, (4, 9)).tolist()
    guard = safeopt.Guard(model, safeopt.Anchors.from_tokens(rows, rows))
    optimizer = safeopt.SafeAdamW(model.parameters(), guard=guard)
    assert takes_lists(optimizer, guard, Precision())
    calls, propose = [], native.propose
    monkeypatch.setattr(native, "propose", lambda *a: (calls.append(1), propose(*a))[1])
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert calls
    for option in ("amsgrad", "maximize"):
        other = safeopt.SafeAdamW(model.parameters(), guard=guard, **{option: True})
        assert not takes_lists(other, guard, Precision())
    assert not takes_lists(optimizer, guard, Precision("kahan"))
    assert not takes_lists(
        safeopt.SafeAdamW(model.double().parameters(), guard=guard), guard, Precision()
    )


@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [
        (torch.float32, {"amsgrad": True}, "know no amsgrad=True"),
        (torch.bfloat16, {}, "not float32"),
        (torch.bfloat16, {"rounding": "kahan"}, "rounds no kahan"),
    ],
)
def test_asked_for_by_name_it_raises_before_anything_changes(
    dtype: torch.dtype, options: dict[str, Any], reason: str
) -> None:
    model = llama().to(dtype)
    guard = safeopt.Guard(model, random_anchors())
    optimizer = safeopt.SafeAdamW(model.parameters(), guard=guard, **options)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=f"native was asked for.*{reason}"):
        take_training_step(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


def test_a_gradient_that_is_not_finite_stops_a_large_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEOPT_KERNELS", "auto")
    model = Wide()
    rows = torch.randint(0, 16, (4, 9)).tolist()
    guard = safeopt.Guard(model, safeopt.Anchors.from_tokens(rows, rows))
    optimizer = safeopt.SafeAdamW(model.parameters(), guard=guard)
    first, second = model.parameters()
    first.grad, second.grad = torch.randn_like(first), torch.randn_like(second)
    second.grad[1000, 7] = torch.inf
    before = first.detach().clone()
    with pytest.raises(FloatingPointError, match=r"layers\.1\.weight"):
        optimizer.step()
    assert torch.equal(first, before)
    second.grad[1000, 7] = 3e38  # its square is infinite, and it is not
    optimizer.step()
    assert not torch.equal(first, before)
