"""The C++ kernels against the float64 reference, in every build that this CPU can run."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeopt_kernels import dispatch, native, ops, reference
from tests.kernels.test_ops import ADAMW, Lists, sizes_of, worst

pytestmark = pytest.mark.usefixtures("native_kernels")

# Of the sizes of what is added up, in float32, after what rounds to bf16 has done so. With AMX
# tiles what does not has 16 bits in products: each factor rounds by 2^-17, and a product of the two
# lower halves, 2^-18, is left out.
PRODUCTS, HALVES = 2.0**-20, 2.0**-15
BF16 = 2.0**-8  # what rounding to bf16 may do
FP32 = 64 * 2.0**-23

# The code for AMX with its tiles in plain C++, where the CPU has what else it takes.
EMULATED = native.Build(
    native.AMX.source,
    native.AVX512.instructions,
    ("-include", str(Path(__file__).parent / "emulated_tiles.h")),
)
EMULATED_BF16 = replace(EMULATED, rounds=True)
CAN_EMULATE = native.AVX512 in native.builds(rounding=False)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for libraries that is empty when the tests start."""
    return tmp_path_factory.mktemp("cache")


def name_of(build: native.Build) -> str:
    tiles = "emulated-tiles" if build.source == EMULATED.source and build.more else None
    return f"{tiles or build.instructions[-1]}{'-rounded' if build.rounds else ''}"


@pytest.fixture(
    params=[*native.builds(rounding=True), *([EMULATED, EMULATED_BF16] if CAN_EMULATE else [])],
    ids=name_of,
)
def chosen(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> native.Build:
    """One build, taken instead of the fastest; its buffers hold NaN where nothing was written."""
    build: native.Build = request.param
    poisoned = replace(build, more=(*build.more, "-DSAFEOPT_POISON"))
    monkeypatch.setenv("SAFEOPT_CACHE", str(cache))
    try:
        library = native.declared(poisoned.compile())
    except RuntimeError as error:
        if "does not hand out" not in str(error):
            raise
        pytest.skip(str(error))
    monkeypatch.setattr(native, "_library", lambda: library)
    return build


def entered(x: Tensor, build: native.Build) -> Tensor:
    """What of float32 numbers enters a product."""
    return (x.float().bfloat16() if build.rounds else x).double()


def check(lists: Lists, build: native.Build) -> None:
    """One step of a list, and its low-rank part off again, against float64."""
    count, has_halves = len(lists.left[0]), build.source == native.AMX.source and not build.rounds
    products = HALVES if has_halves else PRODUCTS
    before = [p.double() for p in lists.p]
    moments = [(m.double(), v.double()) for m, v in zip(lists.m, lists.v, strict=True)]
    sizes = [sizes_of(lists, i) for i in range(len(moments))]
    c, squared_norm = lists.propose(in_place=True)
    expected, exact = torch.zeros(2, count, dtype=torch.float64)
    total, scale = 0.0, 1e-300
    for i, (m, v) in enumerate(moments):
        truth = reference.propose_(before[i], lists.g[i], m, v, ADAMW)
        stored, left, right = lists.p[i].double() - before[i], lists.left[i], lists.right[i]
        assert worst(lists.p[i], before[i] + truth) < FP32
        assert worst(lists.m[i], m, sizes[i][0]) < FP32
        assert worst(lists.v[i], v) < FP32
        total += float(stored.square().sum())
        exact += reference.coefficients(stored, left, right)
        if len(stored) != 1:  # rows have no matrix product
            stored, right = entered(stored, build), entered(right, build)
        expected += reference.coefficients(stored, left.double(), right.double())
        scale += float(stored.norm() * left.norm() * right.norm())
    assert float((c - expected).abs().max()) <= products * scale
    assert float((c - exact).abs().max()) <= BF16 * scale
    assert float(squared_norm) == pytest.approx(total, rel=FP32)

    moved = [p.double() for p in lists.p]
    weights = torch.randn(count, dtype=torch.float64)
    ops.low_rank_apply_(lists.p, lists.left, lists.right, weights)
    for p, start, left, right in zip(lists.p, moved, lists.left, lists.right, strict=True):
        scaled = weights.float()[:, None, None] * left
        if len(p) != 1:
            scaled, right = entered(scaled, build), entered(right, build)
        x, y = scaled.flatten(0, 1).double(), right.flatten(0, 1).double()
        sizes = x.norm(dim=0)[:, None] * y.norm(dim=0)
        error = (p.double() - (start - x.T @ y)).abs()
        assert bool((error <= products * sizes + FP32 * (start.abs() + p.abs())).all())


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
    check(Lists.random(seed, shapes, count, rank, torch.float32), chosen)


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
    check(Lists.random(seed, shapes, count, rank, torch.float32), chosen)


def test_matrices_of_different_ranks_go_together(chosen: native.Build) -> None:
    one = Lists.random(1, [(40, 50)], 4, 3, torch.float32)
    other = Lists.random(2, [(20, 70), (1, 30)], 4, 6, torch.float32)
    for name in ("p", "g", "m", "v", "left", "right"):
        getattr(one, name).extend(getattr(other, name))
    check(one, chosen)


@pytest.mark.usefixtures("chosen")
def test_no_bit_depends_on_the_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            shapes = [(300, 270), (1, 40000), (64, 64), (1100, 40)]
            lists = Lists.random(4, shapes, 8, 8, torch.float32)
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
        for cached in (native._fastest, native._obstacle_of_machine):
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
    fastest = native.builds(rounding=False)[0]
    first = fastest.compile()
    (made,) = tmp_path.rglob("*.so")
    stamp = made.stat().st_mtime_ns
    assert fastest.compile()._name == first._name == str(made)
    assert made.stat().st_mtime_ns == stamp
    assert list((tmp_path / "kernels").iterdir()) == [made]


# -- which build a CPU gets --------------------------------------------------------------------

_SKYLAKE = "fma avx2 avx512f avx512bw avx512vl avx512dq"
_ZEN4 = f"{_SKYLAKE} avx512_bf16"


@pytest.mark.parametrize(
    ("cpu", "exact", "rounded"),
    [
        (f"{_ZEN4} amx_tile amx_bf16", [native.AMX], [native.AMX_BF16, native.AVX512_BF16]),
        (_ZEN4, [], [native.AVX512_BF16]),
        (_SKYLAKE, [], []),
    ],
)
def test_a_cpu_gets_what_its_instructions_allow(
    cpu: str,
    exact: list[native.Build],
    rounded: list[native.Build],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "_cpu_flags", lambda: set(cpu.split()))
    rest = [*exact, native.AVX512, native.AVX2]
    assert native.builds(rounding=False) == rest
    assert native.builds(rounding=True) == [*rounded, *rest]


@pytest.mark.parametrize(("cpu", "expected"), [("sse2 fma avx2", [native.AVX2]), ("sse2", [])])
def test_older_cpus_get_less(
    cpu: str, expected: list[native.Build], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_cpu_flags", lambda: set(cpu.split()))
    assert native.builds(rounding=True) == native.builds(rounding=False) == expected


@pytest.mark.usefixtures("matmul_precision")
def test_products_are_rounded_where_torch_may_round_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(native, "_fastest", lambda rounding: asked.append(rounding))
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        native._library()
    assert asked == [False, False, True]


@pytest.mark.usefixtures("matmul_precision")
def test_rounding_is_heard_from_the_setting_of_the_backend_alone() -> None:
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        assert native.may_round()
        settings.fp32_precision = "ieee"
        assert not native.may_round()
    finally:
        settings.fp32_precision = before


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

    monkeypatch.setattr(native, "_cpu_flags", lambda: set(f"{_ZEN4} amx_tile amx_bf16".split()))
    monkeypatch.setattr(native.Build, "compile", withheld)
    assert Path(native._library()._name).name.startswith("vectors-")
