"""Update rules of the methods that add to the loss or average weights, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.collapse.methods.anchored import AnchorBudget, Anchored
from benchmarks.collapse.methods.base import Spending, Training
from benchmarks.collapse.methods.constrained_sft import ConstrainedSFT, bounds, token_weights
from benchmarks.collapse.methods.der import LogitReplay
from benchmarks.collapse.methods.ema import WeightAverage
from benchmarks.collapse.methods.ewc import ElasticWeights
from benchmarks.collapse.methods.kl import KLToAligned
from benchmarks.collapse.methods.l2_start import Spring
from benchmarks.collapse.methods.lisa import Lisa
from benchmarks.collapse.methods.mixed import Mixed
from benchmarks.collapse.methods.vectors import without_conflict
from safeopt.anchors import IGNORED
from tests.benchmarks.toy import WORDS, Bigram, chain, nll_gradient, toy_setup

TASK, ANCHOR = (2, 3), (0, 1, 4)


def moved(method: Training) -> tuple[Tensor, Tensor]:
    """Move the table a random way from where the method was built; start and present values."""
    table = method.parameters[0]
    start = table.detach().clone()
    with torch.no_grad():
        table += torch.randn_like(table)
    return start, table.detach().clone()


def gradient(method: Training, *task: int) -> Tensor:
    method.gradients(chain(*(task or TASK)))
    found = method.parameters[0].grad
    assert found is not None
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_budget_meets_a_fractional_rate_and_subtracts_the_start() -> None:
    spent = Spending()
    setup = toy_setup(*((i % 5, 1) for i in range(20)))
    budget = AnchorBudget(setup, 2.4, spent)
    assert len(budget.spend_first(16)) == 16
    dealt = [0 if rows is None else len(rows) for rows in (budget.next() for _ in range(40))]
    assert set(dealt) == {2}
    assert spent.anchor_rows == 2.4 * 40
    with pytest.raises(ValueError, match="budget of 8"):
        AnchorBudget(setup, 0.2, Spending()).spend_first(9)


def test_budget_deals_every_anchor_before_any_twice() -> None:
    setup = toy_setup(*((0, i % 5) for i in range(12)))
    budget = AnchorBudget(setup, 1, Spending())
    rows = torch.cat([budget.deal(5).input_ids, budget.deal(7).input_ids])
    assert sorted(rows[:, 1].tolist()) == sorted(i % 5 for i in range(12))


def test_mixing_weighs_tokens() -> None:
    method = Mixed(toy_setup(ANCHOR), anchors_per_step=1.0, weight=3.0)
    table = method.parameters[0].detach()
    task, anchor = nll_gradient(table, *TASK), nll_gradient(table, *ANCHOR)
    assert_close(gradient(method), (task + 3 * 2 * anchor) / (1 + 3 * 2))
    plain = Mixed(toy_setup(ANCHOR, model=Bigram(1)), anchors_per_step=1.0)
    almost = Mixed(toy_setup(ANCHOR, model=Bigram(1)), anchors_per_step=1.0, weight=1 + 1e-12)
    assert_close(gradient(plain), gradient(almost))


def test_logit_replay_pulls_logits_back() -> None:
    method = LogitReplay(toy_setup(ANCHOR), anchors_per_step=1.0, alpha=0.7)
    start, table = moved(method)
    pull = torch.zeros_like(table)
    for row in ANCHOR[:-1]:
        pull[row] = 0.7 * 2 * (table - start)[row] / (2 * WORDS)
    assert_close(gradient(method), nll_gradient(table, *TASK) + pull)


def test_kl_pulls_probabilities_back() -> None:
    method = KLToAligned(toy_setup(ANCHOR), anchors_per_step=1.0, beta=0.7)
    start, table = moved(method)
    pull = torch.zeros_like(table)
    for row in ANCHOR[:-1]:
        pull[row] = 0.7 * (table[row].softmax(-1) - start[row].softmax(-1)) / 2
    assert_close(gradient(method), nll_gradient(table, *TASK) + pull)


@pytest.mark.parametrize("method", [LogitReplay, KLToAligned])
def test_replay_costs_a_forward_of_the_aligned_model(method: type[Anchored]) -> None:
    built = method(toy_setup(ANCHOR), 0.5)
    for _ in range(4):
        built.step(chain(*TASK))
    assert built.spent == Spending(task_rows=4, anchor_rows=2, forward_rows=2)


def test_spring_is_hookes_law() -> None:
    method = Spring(toy_setup(), strength=0.3)
    start, table = moved(method)
    assert_close(gradient(method), nll_gradient(table, *TASK) + 0.3 * (table - start))


def test_elastic_weights_use_the_mean_of_squared_single_gradients() -> None:
    anchors = [(0, 1), (0, 2), (3, 4)]
    method = ElasticWeights(toy_setup(*anchors), anchors_per_step=1.0, strength=5.0)
    start, table = moved(method)
    fisher = sum(nll_gradient(start, *a).square() for a in anchors) / 3
    assert_close(method.fisher[0], torch.as_tensor(fisher))
    expected = nll_gradient(table, *TASK) + 5 * fisher * (table - start)
    assert_close(gradient(method), expected)
    assert method.spent.anchor_rows == 3


def test_lisa_takes_turns_and_pulls_towards_the_other_state() -> None:
    setup = toy_setup(ANCHOR, options={})
    method = Lisa(setup, anchors_per_step=2.0, task_steps=5, safety_steps=3, rho=0.4)
    for _ in range(4):
        method.step(chain(*TASK))
    assert method.spent.anchor_rows == 0
    method.step(chain(*TASK))
    assert method.spent.anchor_rows == 10
    start, table = moved(method)
    assert_close(gradient(method), nll_gradient(table, *TASK) + 0.4 * (table - start))


def test_lisa_has_no_proximal_term_in_the_first_tenth() -> None:
    method = Lisa(toy_setup(ANCHOR), anchors_per_step=1.0, rho=0.4)
    _, table = moved(method)
    assert_close(gradient(method), nll_gradient(table, *TASK))


def test_constrained_sft_follows_the_gradient_of_its_loss() -> None:
    method = ConstrainedSFT(toy_setup(), beta=0.2)
    start, _ = moved(method)
    tokens = (1, 2, 3, 4, 0, 1, 2)
    found = gradient(method, *tokens)
    table = method.parameters[0].detach().requires_grad_()
    beta = 0.2 * torch.tensor([5.0, 20, 20, 20, 20, 1], dtype=torch.float64)
    rows, targets = torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])
    gain = (table.log_softmax(-1) - start.log_softmax(-1))[rows, targets]
    (-2 / beta * torch.nn.functional.logsigmoid(beta * gain)).mean().backward()
    torch.testing.assert_close(found, table.grad, rtol=0, atol=2e-3)  # the floor of the weights
    assert method.spent.forward_rows == 1


def test_token_weights_are_one_at_the_aligned_model_and_floored() -> None:
    weights = token_weights(torch.tensor([0.0, 0.0, 1e4]), torch.tensor([0.1, 2.0, 1.0]))
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 1e-3]))


def test_bounds_count_from_each_rows_first_reply_token() -> None:
    labels = torch.tensor([[IGNORED] * 2 + [1] * 7, [IGNORED] * 7 + [1] * 2])
    assert bounds({"labels": labels}).tolist() == [5, 20, 20, 20, 20, 1, 1, 5, 20]


def test_average_of_weights_ships_and_training_goes_on_from_the_weights() -> None:
    method = WeightAverage(toy_setup(), decay=0.8)
    table = method.parameters[0]
    expected = table.detach().clone()
    for _ in range(3):
        method.step(chain(*TASK))
        expected = 0.8 * expected + 0.2 * table.detach()
    trained = table.detach().clone()
    with method.deployed():
        assert_close(table.detach(), expected)
    assert torch.equal(table.detach(), trained)
    assert not torch.equal(trained, expected)


def test_surgery_removes_only_what_opposes() -> None:
    safety = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    across = [torch.randn_like(s) for s in safety]
    for sign in (1.0, -1.0):
        task = [a + sign * 10 * s for a, s in zip(across, safety, strict=True)]
        kept = without_conflict(task, safety)
        along = sum(float((k * s).sum()) for k, s in zip(kept, safety, strict=True))
        if sign > 0:
            assert all(torch.equal(k, t) for k, t in zip(kept, task, strict=True))
        else:
            assert along == pytest.approx(0, abs=1e-10)
    zeros = [torch.zeros_like(s) for s in safety]
    assert all(
        torch.equal(k, a) for k, a in zip(without_conflict(across, zeros), across, strict=True)
    )
