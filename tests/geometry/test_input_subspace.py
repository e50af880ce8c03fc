"""InputSubspace against dense float64 projectors and independent measurements of inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import safeopt
from safeopt.geometry import input_subspace
from safeopt.geometry.capture import logits_of
from safeopt.geometry.coverage import find_coverage
from safeopt.geometry.input_subspace import InputSubspace
from safeopt.geometry.inputs import count_for, second_moments, shared_prefix, token_weights
from safeopt.geometry.subspace import GridPiece
from tests import zoo

BASES = {name: zoo.ARCHITECTURES[name] for name in ("llama", "tied-llama", "gpt2")}


@pytest.fixture(params=BASES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return BASES[request.param]().double().eval()


def few_anchors() -> safeopt.Anchors:
    """Fewer tokens than the models are wide, so that full bases leave room to learn."""
    return zoo.random_anchors(count=2, shortest=6, longest=9)


def dense_projector(subspace: InputSubspace, name: str, shape: torch.Size) -> Tensor:
    """The projector on the span of all forbidden changes of one parameter, built row by row."""
    forbidden = []
    if name in subspace.held:
        return torch.eye(shape.numel(), dtype=torch.float64)
    if name in subspace.reads:
        key, dim = subspace.reads[name]
        for direction in subspace.bases[key].T:
            for unit in torch.eye(shape[1 - dim], dtype=torch.float64):
                change = torch.outer(unit, direction)
                forbidden.append((change if dim == 1 else change.T).flatten())
    for row in subspace.rows.get(name, torch.zeros(0)):
        for column in range(shape[1]):
            change = torch.zeros(shape, dtype=torch.float64)
            change[int(row), column] = 1.0
            forbidden.append(change.flatten())
    rows = torch.stack(forbidden)
    return torch.linalg.pinv(rows) @ rows


def test_equals_the_dense_projector(model: nn.Module) -> None:
    subspace = InputSubspace.measure(model, few_anchors(), energy=0.8, rank=3)
    step = zoo.random_step(model)
    kept = {name: s.clone() for name, s in step.items()}
    subspace.remove_(kept)
    chosen = [n for n, s in step.items() if s.numel() <= 3200]
    assert any(n in subspace.rows for n in chosen)
    assert any(n in subspace.held for n in chosen)
    for name in chosen:
        s = step[name].flatten()
        truth = s - dense_projector(subspace, name, step[name].shape) @ s
        assert (kept[name].flatten() - truth).norm() <= 1e-9 * s.norm(), name


def test_full_bases_leave_the_anchors_alone_at_any_length(model: nn.Module) -> None:
    anchors = few_anchors()
    subspace = InputSubspace.measure(model, anchors, energy=1.0)
    batch, others = anchors.batch(), zoo.random_anchors(count=2).batch()
    before, others_before = logits_of(model, batch), logits_of(model, others)
    step = zoo.random_step(model, scale=0.1)  # several times the weights' own deviation
    subspace.remove_(step)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += step[name]
    mask = batch.attention_mask.bool()
    change = (logits_of(model, batch) - before)[mask].abs().max()
    assert change <= 1e-7 * before[mask].abs().max()
    assert (logits_of(model, others) - others_before).abs().max() > 0.01


def test_basis_of_the_head_is_that_of_the_last_hidden_state() -> None:
    model = zoo.llama().double().eval()
    anchors = zoo.random_anchors(count=3)
    states = []
    for ids in anchors.input_ids:
        with torch.no_grad():
            hidden = model.model(ids[None]).last_hidden_state[0]  # type: ignore[operator,union-attr]
        states.append(torch.nn.functional.normalize(hidden, dim=-1) / len(ids) ** 0.5)
    tokens = torch.cat(states)
    _, singular, vectors = torch.linalg.svd(tokens, full_matrices=False)
    subspace = InputSubspace.measure(model, anchors, energy=0.9, batch_size=2)
    basis = subspace.bases["lm_head"]
    shares = singular.square() / singular.square().sum()
    assert basis.shape[1] == int((shares.cumsum(0) < 0.9).sum()) + 1
    torch.testing.assert_close(
        basis @ basis.T, vectors[: basis.shape[1]].T @ vectors[: basis.shape[1]]
    )
    torch.testing.assert_close(subspace.energies["lm_head"][: len(shares)][:20], shares[:20])


def test_matrices_that_read_one_input_share_a_basis() -> None:
    subspace = InputSubspace.measure(zoo.llama(), few_anchors())
    layer = "model.layers.1"
    keys = {n: subspace.reads[f"{layer}.{n}.weight"][0] for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )}  # fmt: skip
    assert len(set(keys.values())) == 4
    assert keys["self_attn.q_proj"] == keys["self_attn.k_proj"] == keys["self_attn.v_proj"]
    assert keys["mlp.gate_proj"] == keys["mlp.up_proj"]
    assert set(subspace.bases) == set(subspace.energies) == {k for k, _ in subspace.reads.values()}


class Table(nn.Module):
    """An embedding read by one matrix: its inputs are whatever the test writes."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(vectors, freeze=False)
        self.head = nn.Linear(vectors.shape[1], len(vectors))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(ids))
        return logits


def test_layers_called_with_a_keyword_are_measured_alike() -> None:
    class Called(nn.Module):
        def __init__(self, key: str | None) -> None:
            super().__init__()
            self.embed, self.head, self.key = nn.Embedding(97, 8), nn.Linear(8, 97), key

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            return self.head(x) if self.key is None else self.head(**{self.key: x})

    positional, by_keyword, anchors = Called(None), Called("input"), few_anchors()
    by_keyword.load_state_dict(positional.state_dict())
    found = [InputSubspace.measure(m, anchors).bases for m in (positional, by_keyword)]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_unit_length_keeps_a_sink_from_taking_the_basis() -> None:
    vectors = torch.eye(8)
    vectors[0] *= 1000.0
    model = Table(vectors)
    anchors = safeopt.Anchors.from_tokens([[0, 1, 2]], [[-100, 1, 2]])
    sink = InputSubspace.measure(model, anchors, energy=0.9, normalise=False)
    fair = InputSubspace.measure(model, anchors, energy=0.9)
    assert sink.bases["head"].shape == (8, 1)
    assert fair.bases["head"].shape == (8, 3)
    torch.testing.assert_close(fair.spectrum(), torch.full((3,), 1 / 3))
    projector = fair.bases["head"] @ fair.bases["head"].T
    torch.testing.assert_close(projector, torch.diag(torch.tensor([1.0] * 3 + [0.0] * 5)))


def test_positions() -> None:
    anchors = safeopt.Anchors.from_tokens(
        [[7, 8, 1, 2, 3], [7, 8, 4, 5]], [[-100, -100, -100, 2, 3], [-100, -100, -100, 5]]
    )
    batch = anchors.batch()
    assert shared_prefix(anchors) == 2
    chosen = {
        p: (token_weights(batch, p, 2) > 0).int().tolist() for p in ("all", "content", "reply")
    }
    assert chosen["all"] == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert chosen["content"] == [[0, 0, 1, 1, 1], [0, 0, 1, 1, 0]]
    assert chosen["reply"] == [[0, 0, 1, 1, 0], [0, 0, 1, 0, 0]]
    torch.testing.assert_close(token_weights(batch, "all", 2).sum(1), torch.ones(2))
    with pytest.raises(ValueError, match=r"one of .*'content'.*'prompt'"):
        token_weights(batch, "prompt", 2)  # type: ignore[arg-type]


def test_rows_are_those_of_the_chosen_tokens(model: nn.Module) -> None:
    anchors = few_anchors()
    everything = torch.cat(anchors.input_ids).unique()
    replies = torch.cat([ids[2:-1] for ids in anchors.input_ids]).unique()
    name = next(n for n, p in model.named_parameters() if "embed_tokens" in n or "wte" in n)
    assert torch.equal(InputSubspace.measure(model, anchors).rows[name], everything)
    chosen = InputSubspace.measure(model, anchors, positions="reply")
    assert torch.equal(chosen.rows[name], replies)
    assert not InputSubspace.measure(model, anchors, hold_rows=False).rows


def test_several_passes_give_the_same_bases(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchors = zoo.random_anchors()
    once = InputSubspace.measure(model, anchors, batch_size=8)
    monkeypatch.setattr(input_subspace, "_MOMENT_BYTES", 1)
    parts = InputSubspace.measure(model, anchors, batch_size=2)
    assert once.reads == parts.reads
    for name, basis in once.bases.items():
        other = parts.bases[name]
        torch.testing.assert_close(basis @ basis.T, other @ other.T)


def test_measuring_leaves_no_trace(model: nn.Module) -> None:
    model.train()
    anchors = few_anchors()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    InputSubspace.measure(model, anchors)
    assert torch.equal(state, torch.get_rng_state())
    assert all(m.training and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())


def test_autocast_in_the_models_forward_does_not_round_what_is_measured() -> None:
    """Accelerate wraps a prepared model's forward so."""
    model, anchors = zoo.llama(), few_anchors()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    subspace = InputSubspace.measure(model, anchors, energy=1.0, rank=None)
    held = subspace.captured(model, anchors, [0, 1])
    torch.testing.assert_close(held, torch.ones(2), atol=1e-5, rtol=0)


def test_captured_energy_is_that_of_the_projected_tokens() -> None:
    model = zoo.llama().double().eval()
    anchors = zoo.random_anchors(count=6)
    subspace = InputSubspace.measure(model, anchors, indices=[0, 1, 2], rank=4)
    held = subspace.captured(model, anchors, [5])
    sites = [s for s in find_coverage(model).sites if s.name in subspace.bases]
    batch = anchors.batch([5])
    moments = second_moments(model, sites, [(batch, token_weights(batch, "all", 0))])
    shares = [
        (subspace.bases[n].T @ m @ subspace.bases[n]).trace() / m.trace()
        for n, m in moments.items()
    ]
    torch.testing.assert_close(held, torch.stack(shares).mean()[None])
    assert 0 < float(held) < 1


def test_survives_its_tensors(model: nn.Module) -> None:
    subspace = InputSubspace.measure(model, few_anchors(), rank=3)
    again = InputSubspace.from_tensors(subspace.layout(), subspace.tensors())
    one, two = (zoo.random_step(model) for _ in range(2))
    two = {name: s.clone() for name, s in one.items()}
    subspace.remove_(one)
    again.remove_(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert again.nbytes == subspace.nbytes > 0


@pytest.mark.parametrize("energy", [0.0, 1.1, -1.0])
def test_refuses_an_energy_out_of_range(energy: float) -> None:
    with pytest.raises(ValueError, match="energy must be in"):
        InputSubspace.measure(zoo.llama(), few_anchors(), energy=energy)


def test_counts_shares() -> None:
    shares = torch.tensor([0.5, 0.3, 0.2, 0.0])
    counts = [count_for(shares, e) for e in (0.4, 0.5, 0.6, 0.8, 0.81, 1.0)]
    assert counts == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("dim", [0, 1])
def test_grid_piece_equals_its_dense_projector(dim: int) -> None:
    outputs, inputs = (torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64)).Q for n in (7, 5))
    mask = torch.rand(3, 3) < 0.5
    mask[0, 1], mask[2, 2] = True, False
    step = torch.randn((7, 5) if dim == 1 else (5, 7), dtype=torch.float64)
    removed: Any = GridPiece(outputs, inputs, mask, dim).removed(step)
    directions = torch.stack(
        [torch.outer(outputs[:, i], inputs[:, j]).flatten() for i, j in mask.nonzero().tolist()]
    )
    flat = (step if dim == 1 else step.T).flatten()
    truth = (directions.T @ (directions @ flat)).view(7, 5)
    torch.testing.assert_close(removed, truth if dim == 1 else truth.T)
