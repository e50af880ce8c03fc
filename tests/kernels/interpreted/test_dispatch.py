"""The operators' choice between Triton and plain torch, where Triton can run."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from safeopt_kernels import lowrank, onesided, ops
from safeopt_kernels.settings import AdamW
from tests.kernels.interpreted.pieces import random_piece

ADAMW = AdamW(lr=1e-2, weight_decay=0.1, step=2)
COUNT, RANK, SHAPE = 3, 2, (20, 34)

# Weights of size one lose terms of that size: what cancels keeps the absolute error of the terms.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}

Tensors = dict[str, Tensor]


def tensors(*, contiguous: bool) -> Tensors:
    piece = random_piece(
        torch.Generator().manual_seed(0), SHAPE, RANK, COUNT, torch.float32, torch.float32
    )
    found = {name: value for name, value in vars(piece).items() if isinstance(value, Tensor)}
    found["basis"] = torch.eye(SHAPE[1], RANK)
    if not contiguous:
        found = {name: value.mT.contiguous().mT for name, value in found.items()}
    return found


def propose(t: Tensors) -> None:
    factors = [t["left"]], [t["right"]]
    ops.adamw_propose_([t["p"]], [t["g"]], [t["m"]], [t["v"]], *factors, COUNT, ADAMW, [t["step"]])


def apply(t: Tensors) -> None:
    t["step"].fill_(1e-2)
    ops.low_rank_apply_([t["p"]], [t["left"]], [t["right"]], torch.ones(COUNT), [t["step"]])


def one_sided(t: Tensors) -> None:
    ops.adamw_onesided_(t["p"], t["g"], t["m"], t["v"], t["basis"], ADAMW)


OPERATORS = [
    (propose, lowrank, "propose"),
    (apply, lowrank, "apply"),
    (one_sided, onesided, "step"),
]


@pytest.mark.parametrize(("operator", "module", "launch"), OPERATORS)
def test_an_operator_launches_its_kernel_and_gives_what_torch_gives(
    operator: Callable[[Tensors], None],
    module: object,
    launch: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, truth = tensors(contiguous=True), tensors(contiguous=True)
    monkeypatch.setenv("SAFEOPT_KERNELS", "triton")
    with mock.patch.object(module, launch, wraps=getattr(module, launch)) as called:
        operator(found)
    called.assert_called_once()
    monkeypatch.setenv("SAFEOPT_KERNELS", "reference")
    operator(truth)
    for name in ("p", "m", "v"):
        torch.testing.assert_close(found[name], truth[name], **TOLERANCE)


@pytest.mark.parametrize(("operator", "module", "launch"), OPERATORS)
def test_what_is_not_contiguous_is_refused_by_name_and_else_handled(
    operator: Callable[[Tensors], None],
    module: object,
    launch: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, truth = tensors(contiguous=False), tensors(contiguous=True)
    before = {name: found[name].clone() for name in ("p", "m", "v")}
    monkeypatch.setenv("SAFEOPT_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="not contiguous"):
        operator(found)
    assert all(torch.equal(found[name], was) for name, was in before.items())
    monkeypatch.setenv("SAFEOPT_KERNELS", "auto")
    operator(found)
    operator(truth)
    for name in before:
        torch.testing.assert_close(found[name], truth[name], **TOLERANCE)
