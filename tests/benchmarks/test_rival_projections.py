"""Update rules of the methods that project, freeze or climb, against closed forms."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor, nn

from benchmarks.collapse.lora import Adapter, adapters
from benchmarks.collapse.methods.agem import AveragedMemory
from benchmarks.collapse.methods.alignment import alignment_matrices, alignment_matrix
from benchmarks.collapse.methods.asft import AsFT
from benchmarks.collapse.methods.base import Setup, Training
from benchmarks.collapse.methods.null_space import NullSpace, input_covariances, leading
from benchmarks.collapse.methods.safe_lora import SafeLoRA, project
from benchmarks.collapse.methods.safeanchor import StaticFisher, fisher_spaces
from benchmarks.collapse.methods.safegrad import SafeGrad
from benchmarks.collapse.methods.sam import SharpnessAware
from benchmarks.collapse.methods.sppft import build as build_sppft
from benchmarks.collapse.methods.sppft import freeze_layers
from tests.benchmarks.conftest import SmallWorld, small_world
from tests.benchmarks.test_methods import setup_of
from tests.benchmarks.toy import Bigram, chain, nll_gradient, toy_setup


def gradient(method: Training, *task: int) -> Tensor:
    method.gradients(chain(*task))
    found = method.parameters[0].grad
    assert found is not None
    return found


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_agem_steps_across_a_memory_that_the_task_opposes() -> None:
    method = AveragedMemory(toy_setup((0, 1)), anchors_per_step=1.0)
    table = method.parameters[0].detach()
    task, memory = nll_gradient(table, 0, 2), nll_gradient(table, 0, 1)
    along = (task * memory).sum() / memory.square().sum()
    expected = task - along.clamp(max=0) * memory
    assert_close(gradient(method, 0, 2), expected)
    elsewhere = AveragedMemory(toy_setup((0, 1), model=Bigram(3)), anchors_per_step=1.0)
    own = elsewhere.parameters[0].detach()
    assert_close(gradient(elsewhere, 3, 2), nll_gradient(own, 3, 2))


def test_safegrad_is_surgery_with_the_kl_gradient_then_adds_it() -> None:
    method = SafeGrad(toy_setup((0, 1)), anchors_per_step=1.0, rho=0.6)
    start = method.parameters[0].detach().clone()
    with torch.no_grad():
        method.parameters[0] += torch.randn_like(start)
    table = method.parameters[0].detach().clone()
    safety = torch.zeros_like(table)
    safety[0] = table[0].softmax(-1) - start[0].softmax(-1)
    task = nll_gradient(table, 0, 2)
    along = (task * safety).sum() / safety.square().sum()
    assert_close(gradient(method, 0, 2), task - along.clamp(max=0) * safety + 0.6 * safety)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_takes_the_gradient_at_the_top_of_the_ball(adaptive: bool) -> None:
    method = SharpnessAware(toy_setup(), rho=0.3, adaptive=adaptive)
    table = method.parameters[0].detach().clone()
    g = nll_gradient(table, 0, 1, 2)
    T = table.abs() if adaptive else torch.ones_like(table)
    top = table + 0.3 * T.square() * g / (T * g).norm()
    assert_close(gradient(method, 0, 1, 2), nll_gradient(top, 0, 1, 2))
    assert torch.equal(method.parameters[0].detach(), table)
    assert method.spent.task_rows == 2


@pytest.mark.parametrize("hard", [False, True])
def test_static_fisher_attenuates_in_the_eigenspace_of_the_tensor(hard: bool) -> None:
    setup = toy_setup((0, 1), (0, 1))
    table = setup.model.get_parameter("table").detach().clone()
    method = StaticFisher(setup, 1.0, fisher_anchors=2, strength=0.4, anchor_weight=0.1, hard=hard)
    own = nll_gradient(table, 0, 1)  # the only eigenvector: F = own own^T
    share = 1.0 if hard else min(1.0, 0.4 * float(own.square().sum()))
    task = nll_gradient(table, 0, 2)
    inside = (task * own).sum() / own.square().sum() * own
    # at the start the anchor term is at its minimum and adds nothing
    assert_close(gradient(method, 0, 2), task - share * inside)
    assert method.spent.anchor_rows == 2


def test_fisher_spaces_are_orthonormal_and_hold_nine_tenths() -> None:
    anchors = [(i, j) for i in range(4) for j in range(3)]
    setup = toy_setup(*anchors)
    ((basis, trace),) = fisher_spaces(setup.model, setup.anchors.batch())
    table = setup.model.get_parameter("table").detach()
    G = torch.stack([nll_gradient(table, *a).flatten() for a in anchors])
    fisher = G.T @ G / len(G)
    assert trace == pytest.approx(float(fisher.trace()))
    assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
    held = float((basis.T @ fisher @ basis).trace()) / trace
    assert held >= 0.9
    fewer = float((basis[:, :-1].T @ fisher @ basis[:, :-1]).trace()) / trace
    assert fewer < 0.9


@pytest.mark.parametrize("place", ["step", "gradient"])
def test_null_space_leaves_the_anchors_inputs_alone(world: SmallWorld, place: str) -> None:
    setup = setup_of(world, {})
    before = {name: p.detach().clone() for name, p in setup.model.named_parameters()}
    method = NullSpace(setup, energy=0.9, place=place)  # type: ignore[arg-type]
    bases = dict(zip(map(id, method.parameters), method.bases, strict=True))
    inside = []
    for batch in islice(world.batches("style", 8), 4):
        method.step(batch)
    for name, p in setup.model.named_parameters():
        change = p.detach() - before[name]
        if id(p) in bases:
            assert float(change.norm()) > 0
            inside.append(float((change @ bases[id(p)]).norm() / change.norm()))
        else:
            assert not bool(change.any())
    # Adam's scaling carries a projected gradient back into the space; a projected step stays out.
    assert max(inside) < 1e-5 if place == "step" else max(inside) > 1e-2


def test_leading_eigenvectors_are_as_few_as_the_energy_allows() -> None:
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    values = torch.tensor([8.0, 1.5, 0.4, 0.1, 0, 0], dtype=torch.float64)
    covariance = Q @ torch.diag(values) @ Q.T
    for energy, count in ((0.79, 1), (0.9, 2), (0.97, 3)):
        basis = leading(covariance, energy).double()
        assert basis.shape == (6, count)
        torch.testing.assert_close(
            basis @ basis.T, Q[:, :count] @ Q[:, :count].T, atol=1e-6, rtol=0
        )


def test_covariances_are_of_real_tokens_alone() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = nn.Embedding(5, 3), nn.Linear(3, 2, bias=False)

        def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
            out: Tensor = self.layer(self.embedding(input_ids))
            return out

    model = Pair()
    anchors = toy_setup((1, 2, 3), (4, 2)).anchors
    found = input_covariances(model, {"layer": model.layer}, anchors)["layer"]
    x = model.embedding.weight.detach()[[1, 2, 3, 4, 2]].double()
    assert_close(found, x.T @ x)


def test_frozen_layers_stay_and_the_others_move(world: SmallWorld) -> None:
    model = small_world("world", 0, {"layers": 3}).model()
    assert freeze_layers(model, 0.28, 0.47) == [0, 1]
    deep = small_world("world", 0, {"layers": 3}).model()
    before = {name: p.detach().clone() for name, p in deep.named_parameters()}
    setup = setup_of(world, {"first": 0.34, "last": 0.66})
    method = build_sppft(Setup(deep, *list(vars(setup).values())[1:]))
    method.step(next(iter(world.batches("style", 8))))
    for name, p in deep.named_parameters():
        assert torch.equal(p.detach(), before[name]) == (".layers.1." in name)


def test_freezing_needs_layers_and_something_left() -> None:
    with pytest.raises(ValueError, match="needs layers"):
        freeze_layers(Bigram(0), 0.3, 0.5)
    block = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})
    with pytest.raises(ValueError, match="smaller block"):
        freeze_layers(block, 0.0, 1.0)


@pytest.fixture
def lora_setup(world: SmallWorld) -> Setup:
    adapted = small_world("world", 0, {"lora_rank": 2})
    setup = setup_of(adapted)
    for adapter in adapters(setup.model):
        nn.init.normal_(adapter.B, std=0.1)
    return setup


def test_only_adapters_train(lora_setup: Setup) -> None:
    trained = {n for n, p in lora_setup.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert len(trained) == 2 * len(adapters(lora_setup.model))


def test_change_of_an_adapter_is_what_the_layer_adds(lora_setup: Setup) -> None:
    adapter = adapters(lora_setup.model)[0]
    layer = lora_setup.model.get_submodule(adapter.name)
    x = torch.randn(3, adapter.A.shape[1])
    torch.testing.assert_close(layer(x), x @ (adapter.weight + adapter.change()).T)


def test_alignment_matrix_is_the_scaled_gram_matrix(world: SmallWorld, lora_setup: Setup) -> None:
    aligned, base = dict(world.model().named_parameters()), world.base().state_dict()
    pairs = alignment_matrices(lora_setup)
    assert pairs
    for adapter, C in pairs:
        V = aligned[f"{adapter.name}.weight"].detach() - base[f"{adapter.name}.weight"]
        assert bool(V.any())
        torch.testing.assert_close(C, V @ V.T / V.square().sum().sqrt())


def test_safe_lora_projects_below_the_threshold_only() -> None:
    V = torch.randn(6, 2)
    C = alignment_matrix(V)
    inside = nn.Parameter(V @ torch.randn(2, 2))
    outside = nn.Parameter(torch.linalg.svd(V).U[:, 2:4].clone())
    A = nn.Parameter(torch.randn(2, 5))
    for B, cosine_is_low in ((inside, False), (outside, True)):
        before = B.detach().clone()
        assert project(Adapter("w", A, B, 2.0, torch.zeros(6, 5)), C, 0.3) == cosine_is_low
        expected = C @ before if cosine_is_low else before
        torch.testing.assert_close(B.detach(), expected)


def test_safe_lora_ships_projected_adapters_and_trains_on(lora_setup: Setup) -> None:
    method = SafeLoRA(lora_setup, threshold=2.0)
    pairs = alignment_matrices(lora_setup)
    trained = [adapter.B.detach().clone() for adapter, _ in pairs]
    with method.deployed():
        for (adapter, C), B in zip(pairs, trained, strict=True):
            torch.testing.assert_close(adapter.B.detach(), C @ B)
    assert all(torch.equal(a.B.detach(), B) for (a, _), B in zip(pairs, trained, strict=True))


def test_asft_penalises_what_leaves_the_alignment_direction(lora_setup: Setup) -> None:
    method = AsFT(lora_setup, strength=0.7)
    adapter, C = alignment_matrices(lora_setup)[0]
    method.penalty().backward()
    eye = torch.eye(len(C))
    M = (eye - C).T @ (eye - C)
    change = adapter.change().detach()
    expected = 0.7 * 2 * adapter.scale * M @ change @ adapter.A.detach().T
    assert adapter.B.grad is not None
    torch.testing.assert_close(adapter.B.grad, expected, rtol=1e-3, atol=1e-6)
    outside = sum(
        ((torch.eye(len(C)) - C) @ a.change()).square().sum() for a, C in method._matrices
    )
    torch.testing.assert_close(method.penalty(), 0.7 * torch.as_tensor(outside))
