"""Acceleration of anchor losses against finite differences of a real path."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from safeopt.curvature import (
    Hessian,
    acceleration,
    coupling,
    level_set_curvature,
    reply_predictions,
)
from safeopt.geometry import GradientSketch, find_coverage
from safeopt.losses import reply_nll
from tests.zoo import gpt2, random_anchors, relative_error, trainable


def test_level_set_curvature_of_a_quadratic_is_exact_at_any_scale() -> None:
    matrices = torch.randn(3, 6, 6, dtype=torch.float64)
    matrices = matrices + matrices.transpose(1, 2)
    slopes, p = torch.randn(3, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    s = torch.randn(6, dtype=torch.float64)

    def losses() -> torch.Tensor:
        return slopes @ p + 0.5 * torch.einsum("i,nij,j->n", p, matrices, p)

    gradients = slopes + matrices @ p
    before = p.clone()
    for scale in (0.1, 3.0):
        found = level_set_curvature({"p": p}, losses, {"p": s}, gradients @ s, scale=scale)
        truth = torch.einsum("i,nij,j->n", s, matrices, s)
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)
        assert torch.equal(p, before)


def test_acceleration_is_the_second_derivative_along_gradient_flow() -> None:
    """Against the losses at three points of a finely integrated flow, in float64 throughout."""
    model, anchors = gpt2().double().eval(), random_anchors(4)
    batch, task = anchors.batch(), reply_predictions(random_anchors(6).batch())
    parameters = trainable(model)
    sketch = GradientSketch.measure(
        model, find_coverage(model), batch, reply_nll, compression_rank=None
    )

    def losses() -> torch.Tensor:
        with torch.no_grad():
            rows = zip(anchors.input_ids, anchors.labels, strict=True)
            each = [F.cross_entropy(model(i[None]).logits[0, :-1], y[1:]) for i, y in rows]
            return torch.stack(each)

    def velocity() -> dict[str, torch.Tensor]:
        gradient = torch.autograd.grad(task(model).loss(), list(parameters.values()))
        return dict(zip(parameters, [-g for g in gradient], strict=True))

    hessian = Hessian(model, lambda m: task(m).loss())
    found = acceleration(sketch, hessian, velocity(), losses, scale=1e-4)
    truth = _second_derivative(parameters, velocity, losses, time=1e-3)
    assert relative_error(found.total, truth) <= 0.01
    assert relative_error(found.level_set, truth) > 0.2  # neither part is enough
    assert relative_error(found.coupling, truth) > 0.2
    torch.testing.assert_close(coupling(sketch, hessian, velocity()), found.coupling)


def _second_derivative(parameters, velocity, losses, time: float, steps: int = 20) -> torch.Tensor:
    """d^2 l / dt^2 at t = 0 from l(-t), l(0) and l(t) along the flow (midpoint rule)."""
    start = {n: p.detach().clone() for n, p in parameters.items()}
    at = [losses()]
    for sign in (1, -1):
        for _ in range(steps):
            h = sign * time / steps
            here = {n: p.detach().clone() for n, p in parameters.items()}
            for half in (0.5, 1.0):
                slope = velocity()
                for n, p in parameters.items():
                    p.data = here[n] + half * h * slope[n]
        at.append(losses())
        for n, p in parameters.items():
            p.data = start[n].clone()
    return (at[1] - 2 * at[0] + at[2]) / time**2
