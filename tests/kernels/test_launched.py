"""What a launch makes Triton compile is a form that was compiled ahead of time.

Triton works out the form from the arguments and hands it to a hook before it compiles it. Here the
hook takes notes and says that there is nothing to compile, so that no GPU is needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.kernels.compiled import TARGETS, backend
from safeopt_kernels import lowrank, onesided
from safeopt_kernels.settings import AdamW, Seed
from safeopt_kernels.specialisations import TRITON_DTYPES, roundings_of, specialisations
from safeopt_kernels.table import Piece

Form = tuple[str, dict[str, str], dict[str, str], dict[Any, Any], int]


class AbsentDevice:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target

    def get_current_device(self) -> str:
        return f"absent {self.get_current_target()}"

    def get_current_stream(self, device: str) -> int:
        return 0


@pytest.fixture(params=["sm_90", "gfx942"])
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    before = driver._active
    driver.set_active(AbsentDevice(TARGETS[name]))
    yield name
    driver._active = before


def forms_of(launch: Any) -> list[Form]:
    """The forms that a call wants compiled."""
    seen: list[Form] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        names = fn.jit_function.arg_names
        constants = {names[path[0]]: str(v) for path, v in compile["constants"].items()}
        (found,) = compile["configs"]
        attributes = {path: value for path, value in found.items() if value}
        seen.append((fn.name, compile["signature"], constants, attributes, compile["num_warps"]))
        return True

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        launch()
    return seen


@cache
def listed(target: str) -> list[Form]:
    return [
        (
            form.kernel.__name__,
            {name: form.full_signature[name] for name in form.kernel.arg_names},
            {name: str(value) for name, value in form.constants.items()},
            form.attributes,
            form.warps,
        )
        for form in specialisations(backend(target))
    ]


def tensor(data: st.DataObject, *shape: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised, at an address that is a multiple of 16 or not."""
    size = int(torch.Size(shape).numel())
    offset = data.draw(st.sampled_from((0, 0, 0, 1)))
    return torch.empty(size + offset, dtype=dtype)[offset:].view(shape)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_every_launch_is_of_a_form_compiled_ahead_of_time(target: str, data: st.DataObject) -> None:
    known = listed(target)
    weight = data.draw(st.sampled_from(list(TRITON_DTYPES)))
    pairs = ((torch.float32, torch.float32), (torch.float32, weight), (weight, torch.float32))
    moment, factor = data.draw(st.sampled_from(pairs))
    rows, cols = (data.draw(st.sampled_from((1, 16, 17, 64))) for _ in range(2))
    count, rank = (
        data.draw(st.sampled_from((1, 16, 70, 512))),
        data.draw(st.sampled_from((0, 1, 8))),
    )
    rounding = data.draw(st.sampled_from(roundings_of(weight)))
    in_place = rounding == "nearest" and data.draw(st.booleans())
    seed = Seed(data.draw(st.integers(0, 2**63 - 1)), data.draw(st.integers(0, 2**32 - 1)))
    p, g, step, owed = (tensor(data, rows, cols, dtype=weight) for _ in range(4))
    m, v = (tensor(data, rows, cols, dtype=moment) for _ in range(2))
    left = tensor(data, count, rank, rows, dtype=factor) if rank else None
    right = tensor(data, count, rank, cols, dtype=factor) if rank else None
    piece = Piece(p, None if in_place else step, g, m, v, left, right, owed, index=rank)
    basis = tensor(data, cols, rank, dtype=factor)
    coefficients, kind = tensor(data, count, dtype=torch.float32), backend(target)
    adamw = AdamW(lr=data.draw(st.sampled_from((0.0, 1e-3, 1.0))))
    found = [
        *forms_of(lambda: lowrank.propose([piece], count, adamw, backend=kind)),
        *forms_of(lambda: lowrank.apply([piece], coefficients, rounding, seed, backend=kind)),
        *forms_of(lambda: onesided.step(piece, basis, adamw, rounding, seed, backend=kind)),
    ]
    assert [form[0] for form in found] == ["propose", "apply", "onesided"]
    for form in found:
        assert form in known
