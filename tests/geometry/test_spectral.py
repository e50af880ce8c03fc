"""Sketch algorithms against dense eigendecompositions; tolerances are the theorems' bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from safeopt.curvature import GaussNewton, Hessian, reply_predictions
from safeopt.geometry import certify_operator
from safeopt.geometry.spectral import (
    Eigenpairs,
    FrequentDirections,
    block_lanczos,
    gram_eigenpairs,
    nystrom,
    nystrom_bound,
    residuals,
)
from tests.zoo import llama, random_anchors

F64 = {"dtype": torch.float64}


def symmetric(values: Tensor) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), **F64))
    return (q * values) @ q.T


def spectral_norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def rebuilt(pairs: Eigenpairs) -> Tensor:
    return (pairs.vectors * pairs.values) @ pairs.vectors.T


def assert_orthonormal(vectors: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(
        vectors.T @ vectors, torch.eye(vectors.shape[1], **F64), rtol=0, atol=tolerance
    )


def decaying_rows(count: int, width: int, power: float) -> Tensor:
    scales = torch.arange(1, width + 1, **F64) ** -power
    return (torch.randn(count, width, **F64) * scales) @ torch.linalg.qr(
        torch.randn(width, width, **F64)
    ).Q


def test_gram_is_exact() -> None:
    g = torch.randn(7, 40, **F64)
    pairs = gram_eigenpairs(g)
    assert_orthonormal(pairs.vectors)
    torch.testing.assert_close(rebuilt(pairs), g.T @ g / 7)


def test_gram_leaves_out_what_repeated_rows_do_not_span() -> None:
    g = torch.randn(3, 20, **F64)
    pairs = gram_eigenpairs(torch.cat([g, g]))
    assert len(pairs.values) == 3
    torch.testing.assert_close(rebuilt(pairs), g.T @ g / 3)


@pytest.mark.parametrize("power", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("size", [1, 4, 12])
def test_frequent_directions_keeps_its_bounds(size: int, power: float) -> None:
    rows = decaying_rows(101, 30, power)
    sketch = FrequentDirections(30, size, **F64)
    for chunk in rows.split(9):  # chunks and buffer do not divide each other
        sketch.append(chunk)
    b = sketch.sketch()
    assert b.shape == (size, 30)
    gap = torch.linalg.eigvalsh(rows.T @ rows - b.T @ b)
    slack = 1e-9 * sketch.energy
    assert float(gap[0]) >= -slack
    assert float(gap[-1]) <= sketch.error + slack
    tails = torch.linalg.svdvals(rows).square()
    for k in range(size + 1):
        assert sketch.error <= float(tails[k:].sum()) / (size + 1 - k) + slack
    assert sketch.energy == pytest.approx(float(rows.square().sum()))


def test_frequent_directions_is_exact_when_all_rows_fit() -> None:
    rows = torch.randn(5, 20, **F64)
    sketch = FrequentDirections(20, 5, **F64)
    for row in rows:
        sketch.append(row)
    assert sketch.error == 0.0
    pairs = sketch.eigenpairs()
    assert_orthonormal(pairs.vectors)
    torch.testing.assert_close(rebuilt(pairs), rows.T @ rows)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_nystrom_error_is_below_the_theorems_in_expectation(power: float) -> None:
    values = torch.arange(1, 61, **F64) ** -power
    matrix, samples = symmetric(values), 16
    errors = []
    for _ in range(40):
        pairs = nystrom(lambda v: matrix @ v, 60, samples, oversampling=0, **F64)
        missing = matrix - rebuilt(pairs)
        assert float(torch.linalg.eigvalsh(missing)[0]) >= -1e-9  # it never exceeds A
        assert_orthonormal(pairs.vectors)
        errors.append(spectral_norm(missing))
    assert sum(errors) / 40 <= nystrom_bound(values, samples)


def test_nystrom_is_exact_on_low_rank() -> None:
    values = torch.zeros(50, **F64)
    values[:6] = torch.rand(6, **F64).sort(descending=True).values + 0.1
    matrix = symmetric(values)
    pairs = nystrom(lambda v: matrix @ v, 50, 6, oversampling=4, **F64)
    torch.testing.assert_close(pairs.values, values[:6], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(rebuilt(pairs), matrix, rtol=1e-6, atol=1e-7)


def test_nystrom_refuses_an_indefinite_operator() -> None:
    matrix = symmetric(torch.linspace(-1, 1, 20, **F64))
    with pytest.raises(ValueError, match="block_lanczos"):
        nystrom(lambda v: matrix @ v, 20, 10, **F64)


@pytest.mark.parametrize("values", [
    torch.cat([torch.tensor([5.0, 4.0, 3.0], **F64), torch.linspace(-1, 1, 57, **F64)]),
    torch.cat([torch.full((3,), 2.0, **F64), torch.linspace(-3, 1, 57, **F64)]),
])  # fmt: skip
def test_lanczos_is_within_its_residuals(values: Tensor) -> None:
    matrix = symmetric(values)
    for iterations in (3, 6, 12):
        pairs = block_lanczos(lambda v: matrix @ v, 60, 3, iterations=iterations, **F64)
        assert_orthonormal(pairs.vectors)
        errors = residuals(lambda v: matrix @ v, pairs)
        for value, error in zip(pairs.values, errors, strict=True):
            assert float((values - value).abs().min()) <= float(error) + 1e-9
    truth = values.sort(descending=True).values[:3]
    torch.testing.assert_close(pairs.values, truth, rtol=1e-4, atol=1e-4)


def test_lanczos_directions_are_within_davis_and_kahan() -> None:
    values = torch.cat([torch.tensor([3.0, 2.0], **F64), torch.linspace(-1, 0.5, 48, **F64)])
    matrix = symmetric(values)
    pairs = block_lanczos(lambda v: matrix @ v, 50, 2, iterations=4, **F64)
    truth = torch.linalg.eigh(matrix).eigenvectors.flip(1)
    errors = residuals(lambda v: matrix @ v, pairs)
    for i, others in enumerate(([2.0, 0.5], [3.0, 0.5])):
        gap = min(abs(float(pairs.values[i]) - other) for other in others)
        cosine = float(truth[:, i] @ pairs.vectors[:, i])
        assert (1 - min(1.0, cosine**2)) ** 0.5 <= float(errors[i]) / gap + 1e-7


def test_lanczos_stops_when_the_space_is_exhausted() -> None:
    matrix = symmetric(torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0], **F64))
    pairs = block_lanczos(lambda v: matrix @ v, 5, 2, iterations=50, **F64)
    torch.testing.assert_close(pairs.values, torch.tensor([2.0, 1.0], **F64))
    with pytest.raises(ValueError, match="cannot give 4 pairs"):
        block_lanczos(lambda v: matrix @ v, 5, 4, block=1, iterations=3, **F64)


def test_algorithms_run_on_a_models_operators() -> None:
    """One basis of a real Gauss-Newton operator, found in two ways and certified."""
    model = llama(hidden_size=16, intermediate_size=16, num_hidden_layers=1).double()
    predict = reply_predictions(random_anchors(2, 5, 7).batch())
    names = [n for n, p in model.named_parameters() if "mlp" in n or "norm" in n]
    operator = GaussNewton(model, predict, names=names)
    truth = torch.linalg.eigvalsh(operator.dense()).flip(0)
    found = nystrom(operator.flat, operator.size, 12, oversampling=12, **F64)
    lanczos = block_lanczos(operator.flat, operator.size, 3, iterations=16, **F64)
    torch.testing.assert_close(lanczos.values, truth[:3], rtol=1e-4, atol=1e-9)
    assert float((truth[:12] - found.values).max()) <= nystrom_bound(truth, 24)
    certificate = certify_operator(operator.flat, found.vectors, probes=20)
    captured = float(torch.trace(found.vectors.T @ operator.dense() @ found.vectors))
    share = captured / float(truth.clamp(min=0).sum())
    assert certificate.lower_bound <= share
    assert certificate.captured == pytest.approx(share, abs=0.1)
    hessian = Hessian(model, lambda m: predict(m).loss(), names=names)
    sharpest = block_lanczos(hessian.flat, hessian.size, 1, block=4, iterations=12, **F64)
    assert not sharpest.vectors.requires_grad
    assert float(residuals(hessian.flat, sharpest)[0]) <= 1e-2 * float(sharpest.values[0])
