"""Rules of rank allocation against dense gradients, at equal size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.collapse.methods import METHODS, ranked
from benchmarks.collapse.methods.second_order import Push
from benchmarks.collapse.suite import Batch
from safeopt import GradientSketch
from safeopt.geometry import find_coverage
from safeopt.geometry.frame import Frame
from safeopt.geometry.input_subspace import InputSubspace
from safeopt.geometry.moves import Eigenbasis
from safeopt.losses import reply_nll
from tests import zoo
from tests.benchmarks.toy import toy_setup


def batch() -> Batch:
    ids = torch.randint(0, zoo.VOCABULARY, (4, 10))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def test_sharpness_is_the_anchors_gradient_energy_along_an_input() -> None:
    model, anchors = zoo.llama(), zoo.random_anchors(count=3)
    everything = InputSubspace.measure(model, anchors, energy=1.0)
    found = ranked.sharpness(model, anchors, everything)
    truth = zoo.per_example_gradients(model, anchors)
    key = "model.layers.0.self_attn.q_proj"
    readers = [n for n, (k, _) in everything.reads.items() if k == key]
    assert len(readers) == 3
    along = sum(
        (truth.gradients[n].float() @ everything.bases[key]).square().sum((0, 1)) for n in readers
    )
    torch.testing.assert_close(found[key], along / 3, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("rule", ["threshold", "sharpness", "coupled", "met"])
def test_rules_hold_as_many_floats(rule: ranked.Rule) -> None:
    setup = replace(toy_setup(), model=zoo.llama(), anchors=zoo.random_anchors())
    usual = InputSubspace.measure(setup.model, setup.anchors, energy=0.6)
    floats = sum(basis.numel() for basis in usual.bases.values())
    before = [p.detach().clone() for p in setup.model.parameters()]
    found = ranked.ranked(setup, batch(), rule, 0.6)
    held = sum(basis.numel() for basis in found.bases.values())
    assert floats - 48 <= held <= floats  # less than one direction is left
    assert (found.bases.keys(), found.rows.keys()) == (usual.bases.keys(), usual.rows.keys())
    assert all(torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))


def test_the_best_directions_per_float_are_taken() -> None:
    bases = {"narrow": torch.eye(2), "wide": torch.eye(4)}
    scores = {"narrow": torch.tensor([1.0, 3.0]), "wide": torch.tensor([5.0, 3.9, 8.0, 0.0])}
    found = ranked.best(InputSubspace(bases, {}, {}, (), {}), scores, floats=11)
    assert torch.equal(found.bases["narrow"], torch.eye(2)[:, [1]])
    assert torch.equal(found.bases["wide"], torch.eye(4)[:, [0, 2]])


def test_a_run_under_a_rule_and_a_run_with_coupled_eigenvectors() -> None:
    for name, options in (
        ("ranked", {"rule": "coupled", "energy": 0.5}),
        ("second_order", {"keep": 2, "by": "coupling", "anchors_per_refresh": 4}),
    ):
        setup = replace(
            toy_setup(), model=zoo.llama(), anchors=zoo.random_anchors(), options=options
        )
        method, data = METHODS[name](setup), batch()
        before = {n: p.detach().clone() for n, p in setup.model.named_parameters()}
        losses = [method.step(data)["loss"] for _ in range(4)]
        assert torch.tensor(losses).isfinite().all()
        assert any(not torch.equal(p, before[n]) for n, p in setup.model.named_parameters())
        assert method.spent.task_rows >= 16


def test_coupled_eigenvectors_are_those_that_the_task_pushes() -> None:
    model, anchors = zoo.llama(), zoo.random_anchors(count=4)
    sketch = GradientSketch.measure(
        model, find_coverage(model), anchors.batch(), reply_nll, compression_rank=None
    )
    gram = sketch.gram()
    basis = Eigenbasis.of(gram, None, 1e-8)
    frame = Frame((0, 1, 2, 3), frozenset(sketch.blocks), sketch, gram, basis, False)
    sharp = Push().leading(frame, 2)
    torch.testing.assert_close(sharp.values, basis.values[:2])
    # Along u_3 alone nothing but the fourth eigenvector is pushed.
    weights = basis.vectors[:, 3] / basis.values[3].sqrt()
    along = {n: torch.zeros_like(p, requires_grad=False) for n, p in zoo.trainable(model).items()}
    sketch.subtract_(along, -weights)
    chosen = Push(along).leading(frame, 1)
    torch.testing.assert_close(chosen.values, basis.values[3:4])
