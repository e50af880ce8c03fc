"""The C++ kernels of CPUs with AMX tiles against the float64 reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeopt_kernels import build, dispatch, native, ops, reference
from tests.kernels.test_ops import ADAMW, Lists, worst

pytestmark = pytest.mark.usefixtures("native_kernels")

# Factors and steps enter the products with 16 bits: each rounds by 2^-17, and a product of the two
# lower halves, 2^-18, is left out.
PRODUCTS = 2.0**-15
FP32 = 64 * 2.0**-23


def check(lists: Lists) -> None:
    """One step of a list, and its low-rank part off again, against float64."""
    count = len(lists.left[0])
    before = [p.double() for p in lists.p]
    moments = [(m.double(), v.double()) for m, v in zip(lists.m, lists.v, strict=True)]
    c, squared_norm = lists.propose(in_place=True)
    expected, total, scale = torch.zeros(count, dtype=torch.float64), 0.0, 1e-300
    for i, (m, v) in enumerate(moments):
        truth = reference.propose_(before[i], lists.g[i], m, v, ADAMW)
        stored = lists.p[i].double() - before[i]
        assert worst(lists.p[i], before[i] + truth) < FP32
        assert worst(lists.m[i], m) < FP32
        assert worst(lists.v[i], v) < FP32
        expected += reference.coefficients(stored, lists.left[i], lists.right[i])
        scale += float(stored.norm() * lists.left[i].norm() * lists.right[i].norm())
        total += float(stored.square().sum())
    assert float((c - expected).abs().max()) <= PRODUCTS * scale
    assert float(squared_norm) == pytest.approx(total, rel=1e-6)

    moved = [p.double() for p in lists.p]
    weights = torch.randn(count, dtype=torch.float64)
    ops.low_rank_apply_(lists.p, lists.left, lists.right, weights)
    for p, start, left, right in zip(lists.p, moved, lists.left, lists.right, strict=True):
        pairs = zip(left.double(), right.double(), strict=True)
        terms = [a * x.T @ y for a, (x, y) in zip(weights, pairs, strict=True)]
        pairs = zip(left.double(), right.double(), strict=True)
        norms = [(x.norm(dim=0)[:, None], y.norm(dim=0)) for x, y in pairs]
        sizes = [abs(a) * x * y for a, (x, y) in zip(weights, norms, strict=True)]
        error = (p.double() - (start - sum(terms))).abs()
        assert bool((error <= PRODUCTS * sum(sizes) + FP32 * (start.abs() + p.abs())).all())


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 140)), min_size=1, max_size=4),
    count=st.integers(1, 9),
    rank=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_steps_of_random_shapes_are_the_reference(
    shapes: list[tuple[int, int]], count: int, rank: int, seed: int
) -> None:
    check(Lists.random(seed, shapes, count, rank, torch.float32))


@pytest.mark.parametrize(
    "shapes",
    [[(1, 1)], [(15, 17)], [(37, 200)], [(0, 4)], [(16, 32)], [(1, 9000)], [(700, 900), (900, 3)]],
    ids=str,
)
@pytest.mark.parametrize(("count", "rank"), [(1, 1), (8, 8), (16, 8), (3, 25)])
def test_steps_of_ragged_shapes_are_the_reference(
    shapes: list[tuple[int, int]], count: int, rank: int
) -> None:
    seed = int(torch.randint(2**31, ()))
    check(Lists.random(seed, shapes, count, rank, torch.float32))


def test_matrices_of_different_ranks_go_together() -> None:
    one = Lists.random(1, [(40, 50)], 4, 3, torch.float32)
    other = Lists.random(2, [(20, 70), (1, 30)], 4, 6, torch.float32)
    for name in ("p", "g", "m", "v", "left", "right"):
        getattr(one, name).extend(getattr(other, name))
    check(one)


def test_no_bit_depends_on_the_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            lists = Lists.random(4, [(300, 270), (1, 9000), (64, 64)], 8, 8, torch.float32)
            c, norm = lists.propose(in_place=True)
            ops.low_rank_apply_(lists.p, lists.left, lists.right, 1e-3 * c)
            found.append([c, norm, *lists.p, *lists.m, *lists.v])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_found_anywhere(bad: float) -> None:
    tensors = [torch.full((5,), 3e38), torch.randn(70, 91), torch.randn(0), torch.randn(4097)]
    assert native.all_finite(tensors)
    for tensor in (t for t in tensors if t.numel()):
        place = int(torch.randint(tensor.numel(), ()))
        kept = float(tensor.view(-1)[place])
        tensor.view(-1)[place] = bad
        assert not native.all_finite(tensors)
        tensor.view(-1)[place] = kept


# -- who takes which way -----------------------------------------------------------------------


def taken(p: Tensor) -> str:
    return dispatch.implementation([p], [torch.zeros_like(p)])


def test_the_automatic_choice_takes_it_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = torch.zeros(9, 9), torch.zeros(1024, 1024)
    assert taken(small) == "native"
    monkeypatch.setenv("SAFEOPT_KERNELS", "auto")
    assert taken(small) == "reference"
    assert taken(large) == "native"
    assert taken(large.double()) == "reference"
    assert taken(large.T[1:]) == "reference"
    monkeypatch.setenv("SAFEOPT_KERNELS", "reference")
    assert taken(large) == "reference"


@pytest.mark.parametrize(
    ("dtype", "in_place", "message"),
    [(torch.float64, True, "not float32"), (torch.float32, False, "a buffer of their own")],
)
def test_asked_for_by_name_it_raises_before_anything_changes(
    dtype: torch.dtype, in_place: bool, message: str
) -> None:
    lists = Lists.random(5, [(4, 4)], 2, 1, dtype)
    before = [lists.p[0].clone(), lists.m[0].clone()]
    with pytest.raises(RuntimeError, match=f"native was asked for.*{message}.*unset"):
        lists.propose(in_place=in_place)
    assert torch.equal(lists.p[0], before[0])
    assert torch.equal(lists.m[0], before[1])


def test_there_is_no_native_one_sided_step() -> None:
    p, g, m, v = (torch.rand(4, 8) for _ in range(4))
    with pytest.raises(RuntimeError, match="no one-sided step"):
        ops.adamw_onesided_(p, g, m, v, torch.eye(8)[:, :2].contiguous(), ADAMW)


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("no-such-compiler", r"install g\+\+, or set CXX"), ("false", "false cannot compile")],
)
def test_without_a_compiler_one_gets_the_reference_or_is_told(
    compiler: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("SAFEOPT_CACHE", str(tmp_path))
    for cached in (native._library, native._obstacle_of_machine):
        cached.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=message):
            Lists.random(6, [(4, 4)], 2, 1, torch.float32).propose(in_place=True)
        monkeypatch.setenv("SAFEOPT_KERNELS", "auto")
        assert taken(torch.zeros(1024, 1024)) == "reference"
        assert not list(tmp_path.rglob("*.so"))
    finally:
        for cached in (native._library, native._obstacle_of_machine):
            cached.cache_clear()


def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAFEOPT_CACHE", str(tmp_path))
    first = build.library(native._SOURCE, native._FLAGS)
    (made,) = tmp_path.rglob("*.so")
    stamp = made.stat().st_mtime_ns
    assert build.library(native._SOURCE, native._FLAGS)._name == first._name == str(made)
    assert made.stat().st_mtime_ns == stamp
    assert list((tmp_path / "kernels").iterdir()) == [made]
