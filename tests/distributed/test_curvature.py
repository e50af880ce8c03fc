"""Finite-difference operators under DDP and fully_shard equal exact ones in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from safeopt.anchors import Anchors
from safeopt.curvature import GaussNewton, Hessian, reply_predictions
from safeopt.curvature.operators import CurvatureOperator
from tests.distributed.jobs import wrap
from tests.distributed.ranks import run_ranks
from tests.zoo import llama, random_anchors, relative_error, trainable

pytestmark = pytest.mark.multi

EXAMPLES = 8  # 3, 3 and 2 of them on three ranks


def setting() -> tuple[torch.nn.Module, Anchors, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, anchors = llama(), random_anchors(EXAMPLES)
    return model, anchors, {n: torch.randn_like(p) for n, p in trainable(model).items()}


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def flat(product: dict[str, Tensor]) -> Tensor:
    return torch.cat([whole(product[name]).flatten() for name in sorted(product)])


def work(kind: str, operator: str) -> tuple[Tensor, float, bool]:
    """The product on this rank's share of the examples, its bound, and if weights came back."""
    model, anchors, v = setting()
    rank, world = dist.get_rank(), dist.get_world_size()
    model = wrap(kind, model)
    batch = anchors.batch(range(EXAMPLES)[rank::world])
    predict = reply_predictions(batch, examples=EXAMPLES / world)
    made: CurvatureOperator
    if operator == "hessian":
        made = Hessian(model, lambda m: predict(m).loss(), method="finite_difference")
    else:
        made = GaussNewton(model, predict, method="finite_difference")
    before = {n: whole(p.detach()).clone() for n, p in made.parameters.items()}
    along = {
        n: distribute_tensor(v[n], p.device_mesh, p.placements) if isinstance(p, DTensor) else v[n]
        for n, p in made.parameters.items()
    }
    product = made.matvec(along)
    kept = all(torch.equal(whole(p.detach()), before[n]) for n, p in made.parameters.items())
    clean = all(p.grad is None for p in made.parameters.values())
    return flat(product), made.predicted_error, kept and clean


@pytest.mark.trap("optimizers 0.8", "ux 2.3.2", "ux 2.3.3")
@pytest.mark.parametrize("operator", ["hessian", "gauss-newton"])
@pytest.mark.parametrize(("kind", "world"), [("ddp", 3), ("fsdp", 2), ("fsdp", 3)])
def test_products_equal_those_of_one_process(kind: str, world: int, operator: str) -> None:
    model, anchors, v = setting()
    predict = reply_predictions(anchors.batch())
    if operator == "hessian":
        truth = flat(Hessian(model, lambda m: predict(m).loss()).matvec(v))
    else:
        truth = flat(GaussNewton(model, predict).matvec(v))
    for product, error, clean in run_ranks(world, work, kind, operator):
        assert clean
        assert relative_error(product, truth) <= error
