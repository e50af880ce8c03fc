"""The C++ kernels against the float64 reference, in every build that this CPU can run."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeopt_kernels import dispatch, native, ops, reference
from tests.kernels.test_ops import ADAMW, Lists, worst

pytestmark = pytest.mark.usefixtures("native_kernels")

# With AMX tiles factors and steps enter the products with 16 bits: each rounds by 2^-17, and a
# product of the two lower halves, 2^-18, is left out. The others multiply in float32.
PRODUCTS = {native.AMX: 2.0**-15, native.AVX512: 2.0**-20, native.AVX2: 2.0**-20}
FP32 = 64 * 2.0**-23


@pytest.fixture(params=native.builds(), ids=lambda build: build.instructions[-1])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> native.Build:
    """One build, taken instead of the fastest."""
    build: native.Build = request.param
    try:
        library = native.declared(build.compile())
    except RuntimeError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(native, "_library", lambda: library)
    return build


def check(lists: Lists, products: float) -> None:
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
    assert float((c - expected).abs().max()) <= products * scale
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
        assert bool((error <= products * sum(sizes) + FP32 * (start.abs() + p.abs())).all())


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
    shapes: list[tuple[int, int]], count: int, rank: int, seed: int, chosen: native.Build
) -> None:
    check(Lists.random(seed, shapes, count, rank, torch.float32), PRODUCTS[chosen])


@pytest.mark.parametrize(
    "shapes",
    [[(1, 1)], [(15, 17)], [(37, 200)], [(0, 4)], [(16, 32)], [(1, 9000)], [(700, 900), (900, 3)]],
    ids=str,
)
@pytest.mark.parametrize(("count", "rank"), [(1, 1), (8, 8), (16, 8), (3, 25)])
def test_steps_of_ragged_shapes_are_the_reference(
    shapes: list[tuple[int, int]], count: int, rank: int, chosen: native.Build
) -> None:
    seed = int(torch.randint(2**31, ()))
    check(Lists.random(seed, shapes, count, rank, torch.float32), PRODUCTS[chosen])


def test_matrices_of_different_ranks_go_together(chosen: native.Build) -> None:
    one = Lists.random(1, [(40, 50)], 4, 3, torch.float32)
    other = Lists.random(2, [(20, 70), (1, 30)], 4, 6, torch.float32)
    for name in ("p", "g", "m", "v", "left", "right"):
        getattr(one, name).extend(getattr(other, name))
    check(one, PRODUCTS[chosen])


@pytest.mark.usefixtures("chosen")
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


@pytest.mark.usefixtures("chosen")
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


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """Which build runs is decided anew, in the test and after it."""

    def forget() -> None:
        for cached in (native._library, native._obstacle_of_machine):
            cached.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("no-such-compiler", r"install g\+\+, or set CXX"), ("false", "false cannot compile")],
)
def test_without_a_compiler_one_gets_the_reference_or_is_told(
    compiler: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fresh_library: None,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("SAFEOPT_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=message):
        Lists.random(6, [(4, 4)], 2, 1, torch.float32).propose(in_place=True)
    monkeypatch.setenv("SAFEOPT_KERNELS", "auto")
    assert taken(torch.zeros(1024, 1024)) == "reference"
    assert not list(tmp_path.rglob("*.so"))


def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAFEOPT_CACHE", str(tmp_path))
    fastest = native.builds()[0]
    first = fastest.compile()
    (made,) = tmp_path.rglob("*.so")
    stamp = made.stat().st_mtime_ns
    assert fastest.compile()._name == first._name == str(made)
    assert made.stat().st_mtime_ns == stamp
    assert list((tmp_path / "kernels").iterdir()) == [made]


# -- which build a CPU gets --------------------------------------------------------------------

_ZEN5 = "fma avx2 avx512f avx512bw avx512vl avx512dq avx512_bf16"


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        (f"{_ZEN5} amx_tile amx_bf16", [native.AMX, native.AVX512, native.AVX2]),
        (_ZEN5, [native.AVX512, native.AVX2]),
        ("sse2 fma avx2", [native.AVX2]),
        ("sse2", []),
    ],
)
def test_a_cpu_gets_what_its_instructions_allow(
    cpu: str, expected: list[native.Build], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_cpu_flags", lambda: set(cpu.split()))
    assert native.builds() == expected


def test_a_cpu_without_any_is_told_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, fresh_library: None
) -> None:
    monkeypatch.setattr(native, "_cpu_flags", lambda: {"sse2"})
    with pytest.raises(RuntimeError, match="the CPU lacks fma, avx2"):
        Lists.random(7, [(4, 4)], 2, 1, torch.float32).propose(in_place=True)


def test_where_tiles_are_withheld_the_next_build_is_taken(
    monkeypatch: pytest.MonkeyPatch, fresh_library: None
) -> None:
    compile_ = native.Build.compile

    def withheld(build: native.Build) -> ctypes.CDLL:
        if build == native.AMX:
            raise RuntimeError("the operating system does not hand out AMX tiles")
        return compile_(build)

    monkeypatch.setattr(native, "_cpu_flags", lambda: set(f"{_ZEN5} amx_tile amx_bf16".split()))
    monkeypatch.setattr(native.Build, "compile", withheld)
    assert Path(native._library()._name).name.startswith("vectors-")
