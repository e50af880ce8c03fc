from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.pytorch_utils import Conv1D

import safeopt
from safeopt.geometry import DenseSubspace, GradientSketch, find_coverage
from safeopt.geometry.blocks import LowRankBlock, RowsBlock, cross_gram
from safeopt.geometry.moves import Eigenbasis
from safeopt.losses import reply_nll
from tests.zoo import (
    ARCHITECTURES,
    VOCABULARY,
    llama,
    lora_llama,
    per_example_gradients,
    random_anchors,
    random_step,
    relative_error,
    tied_llama,
    trainable,
)


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return ARCHITECTURES[request.param]().train()


def measure(model: nn.Module, anchors, rank: int | None = None) -> GradientSketch:
    coverage = find_coverage(model)
    assert not coverage.uncovered
    return GradientSketch.measure(
        model, coverage, anchors.batch(), reply_nll, compression_rank=rank
    )


def dense_of(sketch: GradientSketch, model: nn.Module) -> DenseSubspace:
    return DenseSubspace.from_sketch(sketch, {n: p.shape for n, p in trainable(model).items()})


def test_equals_autograd_per_example_gradients(model: nn.Module) -> None:
    anchors = random_anchors()
    truth = per_example_gradients(model, anchors)
    dense = dense_of(measure(model, anchors), model)
    assert set(dense.gradients) == set(truth.gradients)
    for name, gradient in truth.gradients.items():
        assert relative_error(dense.gradients[name], gradient) <= 1e-5, name


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (70, 8), (3, 300), (5, 0)])
def test_gram_matrix_in_row_blocks_is_that_of_the_whole(count: int, rank: int) -> None:
    left = torch.randn(count, rank, 9, dtype=torch.float64)
    right = torch.randn(count, rank, 7, dtype=torch.float64)
    whole = (left.mT @ right).flatten(1)
    torch.testing.assert_close(LowRankBlock(left, right).gram(), whole @ whole.T)


def test_operations_equal_dense(model: nn.Module) -> None:
    sketch = measure(model, random_anchors())
    dense, step = dense_of(sketch, model), random_step(model)
    assert relative_error(sketch.gram(), dense.gram()) <= 1e-5
    assert relative_error(sketch.coefficients(step), dense.coefficients(step)) <= 1e-5
    weights = torch.randn(len(sketch), dtype=torch.float64) * 1e-3
    theirs = {name: s.clone() for name, s in step.items()}
    sketch.subtract_(step, weights)
    dense.subtract_(theirs, weights)
    for name, expected in theirs.items():
        torch.testing.assert_close(step[name], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rank", [None, 4])
def test_tangent_leaves_no_component_in_the_subspace(model: nn.Module, rank: int | None) -> None:
    sketch = measure(model, random_anchors(8), rank)
    dense, step = dense_of(sketch, model), random_step(model)
    basis = dense.basis()
    assert dense.leak(step, basis) > 1e-3
    eigenbasis = Eigenbasis.of(sketch.gram(), None, 1e-4)
    assert basis.shape[1] == len(eigenbasis.values)
    sketch.subtract_(step, eigenbasis.tangent_weights(sketch.coefficients(step)))
    assert dense.leak(step, basis) <= 1e-5


def test_spectrum_is_that_of_the_empirical_fisher() -> None:
    model, anchors = (
        llama(hidden_size=16, intermediate_size=8, num_hidden_layers=1),
        random_anchors(4),
    )
    sketch = measure(model, anchors)
    g = per_example_gradients(model, anchors).matrix()
    fisher = torch.linalg.eigvalsh(g.T @ g / len(anchors)).flip(0)[: len(anchors)]
    torch.testing.assert_close(sketch.spectrum(), fisher, rtol=1e-4, atol=1e-8)


def test_losses_are_the_models_own() -> None:
    model, anchors = llama().eval(), random_anchors(3)
    expected = [
        model(input_ids=ids[None], labels=labels[None]).loss
        for ids, labels in zip(anchors.input_ids, anchors.labels, strict=True)
    ]
    torch.testing.assert_close(measure(model, anchors).losses, torch.stack(expected).detach())


def test_a_tied_embedding_has_both_uses() -> None:
    sketch = measure(tied_llama(), random_anchors())
    kinds = {type(b) for b in sketch.blocks["model.embed_tokens.weight"]}
    assert kinds == {RowsBlock, LowRankBlock}


def test_an_embedding_that_scales_what_it_looks_up() -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY}
    model, anchors = Gemma3ForCausalLM(Gemma3TextConfig(**size, **heads)), random_anchors()
    assert float(model.model.embed_tokens.embed_scale) == 4.0
    guard = safeopt.Guard(model, anchors, anchors_per_refresh=len(anchors), compression_rank=None)
    guard.refresh()
    truth = per_example_gradients(model, anchors)
    dense = dense_of(measure(model, anchors), model)
    for name, gradient in truth.gradients.items():
        assert relative_error(dense.gradients[name], gradient) <= 1e-5, name


def test_unknown_pairs_of_blocks_are_refused() -> None:
    block = LowRankBlock(torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    with pytest.raises(TypeError, match="no inner product"):
        cross_gram(block, block)


def test_only_the_parameters_that_an_optimizer_moves() -> None:
    model, anchors = llama(), random_anchors()
    only = frozenset(name for name in trainable(model) if "layers.1" in name)
    sketch = GradientSketch.measure(
        model, find_coverage(model, only), anchors.batch(), reply_nll, compression_rank=None
    )
    assert set(sketch.blocks) == only


def test_a_module_called_twice_sums_its_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(97, 16), nn.Linear(16, 16)
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 97)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.mix(self.embed(input_ids)).tanh())
            return self.head(self.norm(self.mix(x)))

    model, anchors = Twice(), random_anchors()
    truth, dense = per_example_gradients(model, anchors), dense_of(measure(model, anchors), model)
    assert relative_error(dense.matrix(), truth_in_order(truth, dense)) <= 1e-5


def truth_in_order(truth: DenseSubspace, dense: DenseSubspace) -> torch.Tensor:
    return DenseSubspace({name: truth.gradients[name] for name in dense.gradients}).matrix()


def test_layers_called_with_a_keyword() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(97, 8), Conv1D(8, 8)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 97)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.mix(x=self.embed(input=input_ids)).tanh()
            return self.head(input=self.norm(input=x))

    model, anchors = ByKeyword(), random_anchors()
    truth, dense = per_example_gradients(model, anchors), dense_of(measure(model, anchors), model)
    assert relative_error(dense.matrix(), truth_in_order(truth, dense)) <= 1e-5


def test_output_written_in_place_still_gives_its_gradient() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(97, 8), nn.Linear(8, 8), nn.Linear(8, 97)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu_(self.mix(self.embed(input_ids)).mul_(0.5)))

    model, anchors = InPlace(), random_anchors()
    truth, dense = per_example_gradients(model, anchors), dense_of(measure(model, anchors), model)
    assert relative_error(dense.matrix(), truth_in_order(truth, dense)) <= 1e-5


def test_modules_that_fold_the_batch_away_are_refused() -> None:
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(97, 8), nn.Linear(8, 97)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            flat = self.head(self.embed(input_ids).flatten(0, 1))
            return flat.view(*input_ids.shape, -1)

    with pytest.raises(TypeError, match=r"module 'head'.*cannot be told apart"):
        measure(Folding(), random_anchors())


@pytest.mark.trap("optimizers 0.3")
def test_memory_does_not_hold_dense_gradients() -> None:
    model = llama(hidden_size=64, intermediate_size=128)
    sketch = measure(model, random_anchors(4), rank=2)
    weights = sum(p.numel() * 4 for p in trainable(model).values())
    assert sketch.nbytes < 0.5 * weights
    assert dense_of(sketch, model).nbytes > 4 * weights


@pytest.mark.parametrize("rank", [None, 3])
def test_state_round_trip(rank: int | None) -> None:
    model = tied_llama()
    sketch = measure(model, random_anchors(), rank)
    copy = GradientSketch.from_state_dict(sketch.state_dict())
    step = random_step(model)
    assert torch.equal(copy.gram(), sketch.gram())
    assert torch.equal(copy.coefficients(step), sketch.coefficients(step))


def test_a_fresh_adapter_has_blocks_without_gradient() -> None:
    model = lora_llama()
    assert measure(model, random_anchors()).bounds().all()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()
    sketch = measure(model, random_anchors())
    is_silent = dict(zip(sketch.blocks, (sketch.bounds() == 0).tolist(), strict=True))
    assert is_silent == {name: "lora_A" in name for name in sketch.blocks}
