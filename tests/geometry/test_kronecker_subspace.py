"""KroneckerSubspace, and the one protocol of all four subspaces against DenseSubspace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safeopt
from safeopt.geometry import DenseSubspace, InputSubspace, KroneckerSubspace, find_coverage
from safeopt.geometry.capture import logits_of
from safeopt.geometry.gradient_sketch import GradientSketch
from safeopt.geometry.kronecker_subspace import sharpest
from safeopt.geometry.subspace import Subspace
from safeopt.losses import reply_nll
from safeopt.passport.guard import PassportGuard
from tests import zoo

BASES = {name: zoo.ARCHITECTURES[name] for name in ("llama", "tied-llama", "gpt2")}


@pytest.fixture(params=BASES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return BASES[request.param]().double().eval()


def few_anchors() -> safeopt.Anchors:
    return zoo.random_anchors(count=2, shortest=6, longest=9)


def grid_directions(subspace: KroneckerSubspace, name: str) -> Tensor:
    """The held directions of one matrix, u_i v_j^T one by one, (k, *shape)."""
    key, dim = subspace.inputs.reads[name]
    found = [
        torch.outer(subspace.outputs[name][:, i], subspace.inputs.bases[key][:, j])
        for i, j in subspace.masks[name].nonzero().tolist()
    ]
    return torch.stack(found if dim == 1 else [direction.T for direction in found])


def input_directions(subspace: InputSubspace, name: str, shape: torch.Size) -> Tensor:
    """The held directions of one matrix, e_i v_j^T one by one, (k, *shape)."""
    key, dim = subspace.reads[name]
    units = torch.eye(shape[1 - dim], dtype=torch.float64)
    found = [torch.outer(e, v) for e in units for v in subspace.bases[key].T]
    return torch.stack(found if dim == 1 else [direction.T for direction in found])


def removed_densely(directions: Tensor, name: str, step: Tensor) -> Tensor:
    kept = {name: step.clone()}
    DenseSubspace({name: directions}).remove_(kept)
    return kept[name]


def test_equals_its_materialised_directions(model: nn.Module) -> None:
    subspace = KroneckerSubspace.measure(model, few_anchors(), energy=0.9, rank=4, grid=0.8)
    step = zoo.random_step(model)
    kept = {name: s.clone() for name, s in step.items()}
    subspace.remove_(kept)
    assert len(subspace.outputs) >= 8
    for name in subspace.outputs:
        truth = removed_densely(grid_directions(subspace, name), name, step[name])
        torch.testing.assert_close(kept[name], truth, atol=1e-12, rtol=0, msg=name)
    for name in subspace.inputs.held:
        assert not kept[name].any()
    tied = [n for n in subspace.inputs.reads if n in subspace.inputs.rows]
    for name in tied:  # no grid, since rows and outputs would not commute
        assert name not in subspace.outputs
        assert float(kept[name][subspace.inputs.rows[name]].abs().max()) < 1e-15


def test_inputs_equal_their_materialised_directions() -> None:
    model = zoo.llama().double().eval()
    subspace = InputSubspace.measure(model, few_anchors(), energy=0.8, rank=3)
    step = zoo.random_step(model)
    kept = {name: s.clone() for name, s in step.items()}
    subspace.remove_(kept)
    for name in [n for n in subspace.reads if "layers.1" in n]:
        directions = input_directions(subspace, name, step[name].shape)
        torch.testing.assert_close(
            kept[name], removed_densely(directions, name, step[name]), atol=1e-12, rtol=0
        )


def all_four(model: nn.Module, anchors: safeopt.Anchors) -> dict[str, Subspace]:
    sketch = GradientSketch.measure(
        model, find_coverage(model), anchors.batch(), reply_nll, compression_rank=None
    )
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return {
        "sketch": sketch,
        "dense": DenseSubspace.from_sketch(sketch, shapes),
        "inputs": InputSubspace.measure(model, anchors, energy=0.8),
        "grid": KroneckerSubspace.measure(model, anchors, energy=0.8, grid=0.8),
    }


@pytest.mark.parametrize("kind", ["sketch", "dense", "inputs", "grid"])
def test_removing_is_an_orthogonal_projection(model: nn.Module, kind: str) -> None:
    subspace = all_four(model, few_anchors())[kind]
    step, other = zoo.random_step(model), zoo.random_step(model)
    kept, kept_other = ({n: s.clone() for n, s in x.items()} for x in (step, other))
    subspace.remove_(kept)
    subspace.remove_(kept_other)
    twice = {name: s.clone() for name, s in kept.items()}
    subspace.remove_(twice)
    whole, left = flat(step), flat(kept)
    assert 1e-3 < float((whole - left).norm() / whole.norm()) <= 1
    assert float((flat(twice) - left).norm()) <= 1e-6 * float(whole.norm())
    # P is symmetric: <P a, b> = <a, P b>
    one, two = (whole - left) @ flat(other), whole @ (flat(other) - flat(kept_other))
    assert float((one - two).abs()) <= 1e-6 * float(whole.norm() * flat(other).norm())
    spectrum = subspace.spectrum()
    assert subspace.nbytes > 0
    assert bool((spectrum[:-1] >= spectrum[1:]).all())
    assert float(spectrum[0]) > 0


def flat(step: dict[str, Tensor]) -> Tensor:
    return torch.cat([s.flatten() for s in step.values()])


def test_sketch_and_dense_agree_and_take_the_velocity_away(model: nn.Module) -> None:
    anchors = few_anchors()
    four = all_four(model, anchors)
    step = zoo.random_step(model)
    one, two = ({n: s.clone() for n, s in step.items()} for _ in range(2))
    four["sketch"].remove_(one)
    four["dense"].remove_(two)
    assert zoo.relative_error(flat(step) - flat(one), flat(step) - flat(two)) < 1e-4
    truth = zoo.per_example_gradients(model, anchors)
    before, after = truth.coefficients(step).norm(), truth.coefficients(two).norm()
    assert after < 1e-4 * before  # the sketch is fp32
    torch.testing.assert_close(
        four["sketch"].spectrum(), four["dense"].spectrum(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["sketch", "dense"])
def test_directions_through_all_parameters_need_them_all(kind: str) -> None:
    model = zoo.llama()
    subspace = all_four(model, few_anchors())[kind]
    step = zoo.random_step(model)
    del step["model.norm.weight"]
    with pytest.raises(ValueError, match=r"lacks \['model\.norm\.weight'\].*zeros"):
        subspace.remove_(step)


def test_output_basis_of_the_head_is_that_of_the_softmax_errors() -> None:
    model = zoo.llama().double().eval()
    anchors = zoo.random_anchors(count=3)
    moment = torch.zeros(zoo.VOCABULARY, zoo.VOCABULARY, dtype=torch.float64)
    for i in range(3):
        batch = anchors.batch([i])
        logits, labels = logits_of(model, batch)[0, :-1].detach(), batch.labels[0, 1:]
        errors = logits.softmax(-1)[labels >= 0]
        errors[range(len(errors)), labels[labels >= 0]] -= 1
        moment += errors.T @ errors / errors.square().sum()  # every anchor counts alike
    subspace = KroneckerSubspace.measure(model, anchors, energy=0.8, batch_size=2)
    basis = subspace.outputs["lm_head.weight"]
    values, vectors = torch.linalg.eigh(moment)
    kept = vectors.flip(1)[:, : basis.shape[1]]
    shares = values.flip(0) / values.sum()
    assert basis.shape[1] == int((shares.cumsum(0) < 0.8).sum()) + 1
    torch.testing.assert_close(basis @ basis.T, kept @ kept.T, atol=1e-4, rtol=1e-3)  # fp32 losses
    torch.testing.assert_close(
        subspace.output_energies["lm_head.weight"], shares.clamp(min=0), atol=1e-6, rtol=1e-4
    )


def test_whole_grids_hold_the_anchors_gradients(model: nn.Module) -> None:
    anchors = zoo.random_anchors(count=3)
    whole = KroneckerSubspace.measure(model, anchors, indices=[0, 1], energy=1.0, grid=1.0)
    held = whole.captured(model, anchors, [0, 1, 2])
    torch.testing.assert_close(held[:2], torch.ones(2), atol=1e-5, rtol=0)
    assert float(held[2]) < 0.999
    part = KroneckerSubspace.measure(model, anchors, indices=[0, 1], energy=1.0, grid=0.5)
    assert float(part.captured(model, anchors, [0])) < float(held[0]) - 1e-3
    assert part.nbytes < whole.nbytes or part.masks.keys() == whole.masks.keys()


def test_the_mask_holds_the_largest_products() -> None:
    outputs, inputs = torch.rand(6), torch.rand(5)
    products = torch.outer(outputs, inputs)
    mask = sharpest(outputs, inputs, 0.6)
    assert float(products[mask].min()) >= float(products[~mask].max())
    total = float(products.sum())
    assert float(products[mask].sum()) >= 0.6 * total
    assert float(products[mask].sum() - products[mask].min()) < 0.6 * total
    assert bool(sharpest(outputs, inputs, 1.0).all())


def test_guards_lora_by_the_inputs_of_its_grid(model: nn.Module) -> None:
    from peft import LoraConfig, get_peft_model

    subspace = KroneckerSubspace.measure(model, few_anchors(), energy=0.9, rank=3, grid=0.5)
    options: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}
    adapted: nn.Module = get_peft_model(model, LoraConfig(**options))  # type: ignore[arg-type]
    PassportGuard(adapted.double(), subspace.pieces())
    parameters = dict(adapted.named_parameters())
    checked = 0
    for name in subspace.outputs:
        key, _ = subspace.inputs.reads[name]
        lora = parameters.get(
            f"base_model.model.{name.removesuffix('.weight')}.lora_A.default.weight"
        )
        if lora is not None:
            used = subspace.inputs.bases[key][:, subspace.masks[name].any(0)]
            assert float((lora.detach() @ used).norm()) < 1e-9
            checked += 1
    assert checked >= 8


def test_refuses_a_grid_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"grid must be in \(0, 1\]"):
        KroneckerSubspace.measure(zoo.llama(), few_anchors(), grid=0.0)
