"""The operators on CPU tensors against the float64 reference, and how they are dispatched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from safeopt_kernels import dispatch, ops, reference
from safeopt_kernels.settings import AdamW, Rounding, Seed

ADAMW = AdamW(lr=1e-2, weight_decay=0.1, step=3)
EPS = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


@dataclass
class Lists:
    """Arguments of the operators."""

    p: list[Tensor]
    g: list[Tensor]
    m: list[Tensor]
    v: list[Tensor]
    left: list[Tensor]
    right: list[Tensor]
    step: list[Tensor]

    @classmethod
    def random(
        cls, seed: int, shapes: Sequence[tuple[int, int]], count: int, rank: int, dtype: torch.dtype
    ) -> Lists:
        generator = torch.Generator().manual_seed(seed)
        wide = torch.promote_types(dtype, torch.float32)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        return cls(
            p=[normal(*shape).to(dtype) for shape in shapes],
            g=[normal(*shape).to(dtype) for shape in shapes],
            m=[0.1 * normal(*shape).to(wide) for shape in shapes],
            v=[0.01 * normal(*shape).square().to(wide) for shape in shapes],
            left=[normal(count, rank, rows).to(wide) for rows, _ in shapes],
            right=[normal(count, rank, cols).to(wide) for _, cols in shapes],
            step=[torch.full(shape, torch.nan, dtype=dtype) for shape in shapes],
        )

    def propose(self, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
        step = () if in_place else self.step
        count = self.left[0].shape[0]
        return ops.adamw_propose_(
            self.p, self.g, self.m, self.v, self.left, self.right, count, ADAMW, step
        )


def worst(found: Tensor, truth: Tensor, sizes: Tensor | None = None) -> float:
    """Largest error over the largest true value, or over the largest size of what was added up."""
    if truth.numel() == 0:
        return 0.0
    sizes = truth.abs() if sizes is None else sizes
    worst_error = (found.double() - truth).abs().max() / sizes.max()
    return float(worst_error.nan_to_num(nan=torch.inf))


def sizes_of(lists: Lists, i: int) -> tuple[Tensor, Tensor]:
    """Sizes of what m and the step of a matrix will be sums of, whose signs may differ."""
    m, v = lists.m[i].double().abs(), lists.v[i].double().clone()
    step = reference.propose_(lists.p[i].double().abs(), lists.g[i].abs(), m, v, ADAMW)
    return m, step.abs()


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(list(EPS)),
    shapes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=1, max_size=3),
    count=st.integers(1, 6),
    rank=st.integers(0, 4),
    in_place=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_propose_is_the_reference(
    dtype: torch.dtype,
    shapes: list[tuple[int, int]],
    count: int,
    rank: int,
    in_place: bool,
    seed: int,
) -> None:
    lists = Lists.random(seed, shapes, count, rank, dtype)
    before = [p.to(torch.float64, copy=True) for p in lists.p]
    moments = [
        (m.double().clone(), v.double().clone()) for m, v in zip(lists.m, lists.v, strict=True)
    ]
    truths = [
        reference.propose_(p.double(), g, m, v, ADAMW)
        for p, g, (m, v) in zip(lists.p, lists.g, moments, strict=True)
    ]
    sizes = [sizes_of(lists, i) for i in range(len(shapes))]
    c, squared_norm = lists.propose(in_place=in_place)
    expected, total, scale = torch.zeros(count, dtype=torch.float64), 0.0, 1e-300
    tight = 64 * EPS[torch.promote_types(dtype, torch.float32)]
    for i, truth in enumerate(truths):
        stored = lists.p[i].double() - before[i] if in_place else lists.step[i].double()
        if in_place:
            assert worst(lists.p[i], before[i] + truth) < EPS[dtype] + tight
        else:
            assert worst(stored, truth, sizes[i][1]) < EPS[dtype] + tight
        assert worst(lists.m[i], moments[i][0], sizes[i][0]) < tight
        assert worst(lists.v[i], moments[i][1]) < tight
        expected += reference.coefficients(stored, lists.left[i], lists.right[i])
        scale += float(stored.norm() * lists.left[i].norm() * lists.right[i].norm())
        total += float(stored.square().sum())
    assert float((c - expected).abs().max()) <= tight * scale
    assert float(squared_norm) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
def test_apply_is_the_reference(dtype: torch.dtype, rounding: Rounding) -> None:
    lists = Lists.random(3, [(15, 17), (1, 40), (37, 200), (0, 4)], 5, 2, dtype)
    lists.propose()
    weights = torch.linspace(-1e-3, 1e-3, 5, dtype=torch.float64)
    owed = [1e-3 * torch.ones_like(p) for p in lists.p] if rounding == "kahan" else []
    before = [p.to(torch.float64, copy=True) for p in lists.p]
    debts = [x.to(torch.float64, copy=True) for x in owed]
    ops.low_rank_apply_(
        lists.p, lists.left, lists.right, weights, lists.step, rounding=rounding, compensation=owed
    )
    tight = 64 * EPS[torch.promote_types(dtype, torch.float32)]
    for i, p in enumerate(lists.p):
        removed = reference.low_rank(lists.left[i], lists.right[i], weights)
        exact, stored = before[i] + lists.step[i].double() - removed, p.double()
        bound = EPS[dtype] + tight
        if owed:
            exact, stored = exact + debts[i], stored + owed[i].double()
            bound = EPS[dtype] ** 2 + tight
        assert worst(stored, exact) < bound


def test_handing_over_in_the_weights_takes_the_same_step_as_in_a_buffer() -> None:
    weights = torch.tensor([1e-3, -2e-3], dtype=torch.float64)
    one, other = (Lists.random(4, [(20, 30), (1, 30)], 2, 3, torch.float64) for _ in range(2))
    one.propose()
    ops.low_rank_apply_(one.p, one.left, one.right, weights, one.step)
    other.propose(in_place=True)
    ops.low_rank_apply_(other.p, other.left, other.right, weights)
    for a, b in zip(one.p, other.p, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_step_may_replace_the_gradient() -> None:
    one, other = (Lists.random(5, [(20, 30)], 2, 3, torch.float32) for _ in range(2))
    other.step = other.g
    assert torch.equal(one.propose()[0], other.propose()[0])
    assert torch.equal(one.step[0], other.g[0])


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_one_sided_step_leaves_the_subspace_alone(rank: int) -> None:
    lists = Lists.random(6, [(23, 40)], 1, 0, torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(40, rank, dtype=torch.float64))
    p, g, m, v = lists.p[0].clone(), lists.g[0], lists.m[0].clone(), lists.v[0].clone()
    step = reference.propose_(lists.p[0], g, lists.m[0], lists.v[0], ADAMW)
    squared_norm, along = ops.adamw_onesided_(p, g, m, v, basis, ADAMW)
    torch.testing.assert_close(p, lists.p[0] + reference.project_rows(step, basis))
    assert torch.equal(m, lists.m[0])
    assert float(((p - lists.p[0]) @ basis).abs().max()) < 1e-14
    assert float(squared_norm) == pytest.approx(float(step.square().sum()))
    assert float(along) == pytest.approx(float((step @ basis).square().sum()))


def test_stochastic_rounding_is_right_on_average() -> None:
    exact = 1 + torch.rand(64, 501) * 2.0**-7
    mean = sum(reference.stochastic_bfloat16(exact, Seed(0, t)).double() for t in range(400)) / 400
    # A rounded value is one of two neighbours 2^-7 apart: its deviation is at most half of that.
    assert float((mean - exact.double()).abs().max()) < 6 * 2.0**-8 / 20
    assert float((mean - exact.double()).mean().abs()) < 6 * 2.0**-8 / (20 * 64 * 501) ** 0.5
    seen = reference.stochastic_bfloat16(exact, Seed(0, 1)).float()
    assert set(seen.unique().tolist()) == {1.0, 1.0 + 2.0**-7}


def test_philox_is_the_published_one() -> None:
    # Known answers of the authors' test suite (Random123, kat_vectors), 10 rounds.
    zeros = tuple(torch.zeros(1, dtype=torch.int64) for _ in range(4))
    ones = tuple(torch.full((1,), 0xFFFFFFFF) for _ in range(4))
    words = [int(w) for w in reference.philox(0, zeros)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = [int(w) for w in reference.philox(2**64 - 1, ones)]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_matrices_that_are_not_contiguous_are_handled() -> None:
    one, other = (Lists.random(7, [(20, 30)], 2, 3, torch.float32) for _ in range(2))
    for name in ("p", "g", "m", "v", "step"):
        setattr(other, name, [getattr(other, name)[0].T.contiguous().T])
    torch.testing.assert_close(one.propose()[0], other.propose()[0])
    torch.testing.assert_close(one.step[0], other.step[0])


# -- dispatch ----------------------------------------------------------------------------------


def test_unknown_mode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEOPT_KERNELS", "fast")
    with pytest.raises(ValueError, match="auto, reference, triton"):
        dispatch.mode()


def test_triton_by_name_raises_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEOPT_KERNELS", "triton")
    lists = Lists.random(8, [(4, 4)], 2, 1, torch.float32)
    before = [lists.p[0].clone(), lists.m[0].clone()]
    with pytest.raises(RuntimeError, match=r"tensors are on the CPU.*unset SAFEOPT_KERNELS"):
        lists.propose()
    assert torch.equal(lists.p[0], before[0])
    assert torch.equal(lists.m[0], before[1])


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_automatic_choice_falls_back(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEOPT_KERNELS", mode)
    lists = Lists.random(8, [(4, 4)], 2, 1, torch.float32)
    lists.propose()
    assert bool(lists.step[0].isfinite().all())


def test_compiled_function_calls_the_operators() -> None:
    def step(lists: Lists, weights: Tensor) -> Tensor:
        c, norm = ops.adamw_propose_(
            lists.p, lists.g, lists.m, lists.v, lists.left, lists.right, 2, ADAMW, lists.step
        )
        ops.low_rank_apply_(lists.p, lists.left, lists.right, weights * c, lists.step)
        return c + norm

    plain, compiled = (Lists.random(9, [(20, 30), (1, 8)], 2, 3, torch.float32) for _ in range(2))
    weights = torch.tensor([1e-3, -1e-3], dtype=torch.float64)
    expected = step(plain, weights)
    result = torch.compile(step, backend="aot_eager", fullgraph=True)(compiled, weights)
    assert torch.equal(result, expected)
    for name in ("p", "m", "v", "step"):
        for a, b in zip(getattr(plain, name), getattr(compiled, name), strict=True):
            assert torch.equal(a, b), name


def test_a_call_that_nothing_watches_does_what_the_operator_does() -> None:
    def step(lists: Lists) -> Tensor:
        c, norm = lists.propose()
        ops.low_rank_apply_(lists.p, lists.left, lists.right, 1e-3 * c, lists.step)
        return torch.cat([c, norm[None]])

    watched, alone = (Lists.random(11, [(20, 30), (1, 8)], 2, 3, torch.float32) for _ in range(2))
    changed = [*alone.p, *alone.m, *alone.v, *alone.step]
    versions = [tensor._version for tensor in changed]
    with torch.enable_grad():  # then autograd wants the operator
        expected = step(watched)
    with torch.no_grad():
        assert torch.equal(step(alone), expected)
    assert all(t._version > before for t, before in zip(changed, versions, strict=True))
    for a, b in zip([*watched.p, *watched.m, *watched.v, *watched.step], changed, strict=True):
        assert torch.equal(a, b)


def test_fake_tensors_are_left_to_the_operator() -> None:
    lists = Lists.random(12, [(20, 30)], 2, 3, torch.float32)
    with FakeTensorMode() as mode, torch.no_grad():
        for name, tensors in vars(lists).items():
            setattr(lists, name, [mode.from_tensor(tensor) for tensor in tensors])
        c, norm = lists.propose()
    assert (type(c), type(norm)) == (FakeTensor, FakeTensor)
    assert c.shape == (2,)


@pytest.mark.parametrize("operator", ["adamw_propose_", "low_rank_apply_", "adamw_onesided_"])
def test_schemas_and_fakes_are_true(operator: str) -> None:
    lists = Lists.random(10, [(8, 16), (4, 4)], 2, 1, torch.float32)
    adamw = (1e-3, 0.9, 0.999, 1e-8, 0.0, 1)
    arguments: dict[str, tuple[object, ...]] = {
        "adamw_propose_": (
            lists.p, lists.g, lists.m, lists.v, lists.left, lists.right, lists.step, 2, *adamw
        ),
        "low_rank_apply_": (
            lists.p, lists.left, lists.right, torch.ones(2), lists.g, [], [0, 1], 0, 0, 0
        ),
        "adamw_onesided_": (
            lists.p[0], lists.g[0], lists.m[0], lists.v[0], torch.eye(16)[:, :3].contiguous(), [],
            *adamw, 0, 0, 0,
        ),
    }  # fmt: skip
    overload = getattr(torch.ops.safeopt_kernels, operator).default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(overload, arguments[operator], test_utils=checks)


def test_shards_of_distributed_tensors_work_and_whole_ones_are_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        lists = Lists.random(11, [(8, 16)], 2, 1, torch.float32)
        other = Lists.random(11, [(8, 16)], 2, 1, torch.float32)
        sharded = distribute_tensor(lists.p[0], mesh, [Shard(0)])
        lists.p = [sharded]
        with pytest.raises(TypeError, match="to_local"):
            lists.propose(in_place=True)
        lists.p = [sharded.to_local()]
        assert torch.equal(lists.propose(in_place=True)[0], other.propose(in_place=True)[0])
        assert torch.equal(sharded.full_tensor(), other.p[0])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": [torch.zeros(3, 4)]}, "g must have the shapes of p"),
        ({"step": [torch.zeros(4, 4).double()]}, "step must have one dtype"),
        ({"left": [torch.zeros(2, 1, 5)]}, r"must be \(2, q, rows\)"),
        ({"p": [torch.zeros(4)], "g": [torch.zeros(4)]}, "shapes of p"),
        ({"v": [torch.zeros(4, 4).half()]}, "moments must both be float32"),
        ({"right": [torch.zeros(2, 1, 4).bfloat16()]}, "factors must both be float32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    change: dict[str, list[Tensor]], message: str
) -> None:
    lists = Lists.random(12, [(4, 4)], 2, 1, torch.float32)
    for name, value in change.items():
        setattr(lists, name, value)
    with pytest.raises(ValueError, match=message):
        lists.propose()


def test_factors_and_moments_are_not_both_narrow() -> None:
    lists = Lists.random(14, [(4, 6)], 2, 1, torch.bfloat16)
    narrow = {
        name: [t.bfloat16() for t in getattr(lists, name)] for name in ("m", "v", "left", "right")
    }
    lists.left, lists.right = narrow["left"], narrow["right"]
    lists.propose()
    lists.m, lists.v = narrow["m"], narrow["v"]
    before = [t.clone() for t in (*lists.p, *lists.m, *lists.v)]
    with pytest.raises(ValueError, match=r"pass factors\.float\(\), or keep the moments"):
        lists.propose(in_place=True)
    basis = torch.eye(6, 2, dtype=torch.bfloat16)
    tensors = (lists.p[0], lists.g[0], lists.m[0], lists.v[0])
    with pytest.raises(ValueError, match=r"pass basis\.float\(\)"):
        ops.adamw_onesided_(*tensors, basis, ADAMW)
    for now, then in zip((*lists.p, *lists.m, *lists.v), before, strict=True):
        assert torch.equal(now, then)
    ops.adamw_onesided_(*tensors, basis.float(), ADAMW)
    lists.left, lists.right = ([t.float() for t in ts] for ts in (lists.left, lists.right))
    lists.propose(in_place=True)
    assert not torch.equal(lists.p[0], before[0])


def test_roundings_that_do_not_fit_are_refused() -> None:
    lists = Lists.random(13, [(4, 4)], 2, 1, torch.float32)
    factors = (lists.left, lists.right, torch.zeros(2))
    with pytest.raises(ValueError, match="stores bfloat16"):
        ops.low_rank_apply_(lists.p, *factors, lists.g, rounding="stochastic")
    with pytest.raises(ValueError, match="compensation goes together"):
        ops.low_rank_apply_(lists.p, *factors, lists.g, rounding="kahan")
    with pytest.raises(ValueError, match="wants the steps"):
        ops.low_rank_apply_(lists.p, *factors, rounding="kahan", compensation=lists.g)
