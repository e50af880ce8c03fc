from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from safeopt.curvature import Hessian
from safeopt.diagnostics import Monitor, Verdict
from tests import zoo


def task(model: nn.Module) -> Tensor:
    ids = torch.randint(0, zoo.VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(5))
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def own_anchors(model: nn.Module) -> zoo.safeopt.Anchors:
    """Anchors whose first reply token is the model's own."""
    prompts = torch.randint(0, zoo.VOCABULARY, (5, 4))
    with torch.no_grad():
        first = model.eval()(input_ids=prompts).logits[:, -1].argmax(-1, keepdim=True)
    ids = torch.cat([prompts, first, torch.randint(0, zoo.VOCABULARY, (5, 3))], 1)
    labels = ids.clone()
    labels[:, :4] = -100
    return zoo.safeopt.Anchors.from_tokens(ids.tolist(), labels.tolist())


def moved(model: nn.Module, steps: int) -> dict[str, Tensor]:
    """Move the weights, and tell how far they went a step."""
    step = {n: 1e-3 * torch.randn_like(p) for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += steps * step[name]
    return step


def test_geometry_is_that_of_the_mean_step_since_the_last_reading() -> None:
    model = zoo.llama()
    anchors = own_anchors(model)
    monitor = Monitor(anchors, 20, opening=1, task=task)
    assert "safety/overlap" not in monitor(model, 0)
    step = moved(model, 3)
    with torch.no_grad():  # as a training loop evaluates
        found = monitor(model, 3)
    assert all(p.grad is None for p in model.parameters())

    truth = zoo.per_example_gradients(model.eval(), anchors)
    coefficients = truth.coefficients(step)
    basis = torch.linalg.eigh(truth.gram())
    kept = basis.eigenvalues > 1e-4 * basis.eigenvalues.max()
    inside = (basis.eigenvectors.T @ coefficients)[kept] / basis.eigenvalues[kept].sqrt()
    length = float(sum(s.square().sum() for s in step.values()) ** 0.5)
    assert found["safety/overlap"] == pytest.approx(float(inside.norm()) / length, rel=0.01)

    bend = Hessian(model, task).matvec(step)
    gradients = torch.autograd.grad(task(model), list(model.parameters()))
    scale = length / float(sum(g.square().sum() for g in gradients) ** 0.5)
    expected = -scale * float(truth.coefficients(bend).mean())
    assert found["safety/coupling"] == pytest.approx(expected, rel=0.05)
    assert found["safety/coupling_error"] < 0.05


def test_geometry_comes_at_its_cadence_and_with_a_task_alone() -> None:
    model = zoo.llama()
    anchors = own_anchors(model)
    plain = Monitor(anchors, 20, opening=1)
    seldom = Monitor(anchors, 20, opening=1, task=task, geometry_every=2)
    seen = []
    for step in range(5):
        moved(model, 1)
        assert "safety/overlap" not in plain(model, step)
        seen.append("safety/overlap" in seldom(model, step))
    assert seen == [False, False, True, False, True]


def test_state_carries_what_was_kept_and_what_was_judged() -> None:
    model = zoo.llama()
    anchors = own_anchors(model)
    first = Monitor(anchors, 10, opening=1)
    first(model, 0)
    broken = zoo.llama()
    with torch.no_grad():
        for p in broken.parameters():
            p.copy_(torch.randn_like(p))
    first(broken, 2)
    second = Monitor(anchors, 10, opening=1)
    second.load_state_dict(first.state_dict())
    assert second.verdict is first.verdict is not Verdict.INCONCLUSIVE
    moved(broken, 1)
    assert second(broken, 4) == first(broken, 4)
