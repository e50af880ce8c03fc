"""SafeAdamW with SAFEOPT_KERNELS=triton in Triton's interpreter against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from safeopt_kernels import lowrank
from tests.optim.listed import assert_same, pair, step_both
from tests.zoo import ARCHITECTURES, llama


@pytest.mark.parametrize("name", ["llama", "tied-llama", "lora-llama"])
def test_steps_are_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    for kernel in ("propose", "apply"):
        original = getattr(lowrank, kernel)

        def counted(*a: Any, _run: Any = original, _name: str = kernel, **k: Any) -> Any:
            launches.append(_name)
            return _run(*a, **k)

        monkeypatch.setattr(lowrank, kernel, counted)
    monkeypatch.setenv("SAFEOPT_KERNELS", "triton")
    optimizers = pair(ARCHITECTURES[name]())
    step_both(optimizers, 3)
    assert_same(optimizers, rtol=1e-5, atol=3e-6)
    assert set(launches) == {"propose", "apply"}


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_narrow_weights(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEOPT_KERNELS", "triton")
    model = llama(num_hidden_layers=1, hidden_size=16, intermediate_size=16).to(torch.bfloat16)
    optimizers = pair(model, rounding=rounding, moments_dtype=torch.float32)
    step_both(optimizers, 1)
    for a, b in zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True):
        # The interpreter cuts bfloat16 off: one unit in the last place more.
        bound = 4 * 2.0**-7 * float(b.detach().float().abs().max())
        assert float((a.detach().float() - b.detach().float()).abs().max()) <= bound
