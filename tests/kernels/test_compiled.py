"""Kernels compiled ahead of time, for GPUs that are not here, against the table of ceilings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton
import triton.language as tl

from benchmarks.kernels.ceilings import CEILINGS, kernel_name
from benchmarks.kernels.compiled import TARGETS, Compiled, backend, compile_for
from benchmarks.kernels.registers import compilers, rows
from safeopt_kernels.specialisations import Specialisation, specialisations


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with compilers(os.cpu_count() or 1) as processes:
        yield processes


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TARGETS)
def test_every_form_of_every_kernel_keeps_its_ceilings(target: str, pool: Executor) -> None:
    made = {row["specialisation"]: row["problems"] for row in rows(pool, [target])}
    assert made == {form.name: [] for form in specialisations(backend(target))}


def test_every_kernel_has_a_ceiling_on_every_target() -> None:
    for target in TARGETS:
        for form in specialisations(backend(target)):
            assert target in CEILINGS[kernel_name(form)]


@triton.jit
def throw_away(source, out, COLUMNS: tl.constexpr, DOT: tl.constexpr):
    row, column = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    tile = tl.load(source + row * COLUMNS + column)
    if DOT:
        tl.store(out + row * 64 + tl.arange(0, 64)[None, :], tl.dot(tile, tl.trans(tile)))
    else:
        tl.atomic_add(out + tl.arange(0, 64), tl.sum(tile.to(tl.float32), 0))


def compiled_throw_away(target: str, *, aligned: bool, dot: bool) -> Compiled:
    form = Specialisation(
        name="throw-away",
        kernel=throw_away,
        signature={"source": "*bf16", "out": "*fp32"},
        constants={"COLUMNS": 64 if aligned else 63, "DOT": dot},
        warps=4,
        bytes_per_parameter=2.0,
    )
    return compile_for(form, target)


@pytest.mark.parametrize("target", TARGETS)
def test_the_harness_sees_narrow_loads_atomics_and_tensor_cores(target: str) -> None:
    wide = compiled_throw_away(target, aligned=True, dot=True)
    narrow = compiled_throw_away(target, aligned=False, dot=False)
    assert wide.wide_share == 1.0
    assert narrow.wide_share == 0.0
    assert wide.tensor_cores
    assert not narrow.tensor_cores
    assert narrow.atomics > 0
    assert wide.atomics == 0
