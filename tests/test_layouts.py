"""Layouts that flatten parameters are refused with the way out; the real ones where they run."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import safeopt
from tests.zoo import llama, random_anchors, take_training_step


@pytest.fixture
def one_process() -> Iterator[None]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()
    os.environ.pop("MASTER_PORT", None)


def fsdp1(model: nn.Module, use_orig_params: bool, nested: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(
            model,
            device_id=torch.device("cpu"),
            use_orig_params=use_orig_params,
            auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}) if nested else None,
        )


@pytest.mark.trap("ux 2.2.6", "ux 2.3.4")
@pytest.mark.supports(host="FSDP1", feature="full", refused=True)
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused_before_and_after_wrapping(use_orig_params: bool, nested: bool) -> None:
    model, anchors = llama(), random_anchors()
    early = safeopt.Guard(model, anchors)
    wrapped = fsdp1(model, use_orig_params, nested)
    with pytest.raises(ValueError, match=r"FSDP1 .* use FSDP2 .*fully_shard"):
        safeopt.Guard(wrapped, anchors)
    with pytest.raises(ValueError, match=r"FSDP1.*FSDP2 .*fully_shard"):
        train_one_step(wrapped, early)


def train_one_step(model: nn.Module, guard: safeopt.Guard) -> None:
    optimizer = safeopt.SafeAdamW(model.parameters(), lr=1e-2, guard=guard)
    take_training_step(model, optimizer)


@pytest.mark.trap("optimizers 5.1.19", "ux 2.2.6")
@pytest.mark.supports(host="DeepSpeed ZeRO", feature="full", refused=True)
def test_parameters_partitioned_by_zero_3_are_refused() -> None:
    model = llama()
    guard = safeopt.Guard(model, random_anchors(), refresh_every=1)
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, guard=guard)
    for index, p in enumerate(model.parameters()):
        p.ds_id = index  # DeepSpeed's mark on a partitioned parameter
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO flattens .* use DDP, or FSDP2"):
        safeopt.Guard(model, random_anchors())
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO flattens .* use DDP, or FSDP2"):
        take_training_step(model, optimizer)


class DeepSpeedEngine(nn.Module):
    """Stands for DeepSpeed's class of that name, by which its wrapper is known."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_a_deepspeed_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"DeepSpeed ZeRO flattens .* use DDP, or FSDP2"):
        safeopt.Guard(DeepSpeedEngine(llama()), random_anchors())


@pytest.mark.trap("optimizers 5.1.19")
def test_the_flat_buffer_of_zero_1_and_2_is_refused_at_the_first_step() -> None:
    model = llama()
    guard = safeopt.Guard(model, random_anchors())
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, guard=guard)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    for group in optimizer.param_groups:  # as ZeRO does to the optimizer that it wraps
        group["params"] = [flat]
    before = flat.detach().clone()
    with pytest.raises(ValueError, match=r"DeepSpeed or FSDP1 made this flat buffer.*FSDP2"):
        optimizer.step()
    assert torch.equal(flat, before)
