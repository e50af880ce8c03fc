"""LoRA inside a model, in place: what the LoRA suites train and the LoRA methods read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_NAME = "default"


@dataclass(frozen=True)
class Adapter:
    """One adapted matrix W + scale B A.

    Attributes:
        name: the matrix's module name.
        A: (r, in), trained.
        B: (out, r), trained.
        scale: factor on B A.
        weight: the frozen W, (out, in).
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scale: float
    weight: Tensor

    def change(self) -> Tensor:
        """The change of the matrix, scale B A, (out, in), with gradient."""
        return self.scale * (self.B @ self.A)


def adapt(model: nn.Module, rank: int, seed: int) -> None:
    """Freeze a Llama-like model and give every projection of its layers an adapter of this rank.

    B starts at zero, alpha is twice the rank, there is no dropout.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    for name, p in model.named_parameters():
        p.requires_grad_(".lora_" in name)


def _adapter(name: str, module: Any) -> Adapter:
    A, B = module.lora_A[_NAME].weight, module.lora_B[_NAME].weight
    return Adapter(name, A, B, module.scaling[_NAME], module.base_layer.weight.detach())


def adapters(model: nn.Module) -> list[Adapter]:
    """The adapters of a model.

    Raises:
        ValueError: there are none.
    """
    from peft.tuners.lora import Linear

    found = [_adapter(name, m) for name, m in model.named_modules() if isinstance(m, Linear)]
    if not found:
        raise ValueError("this method trains LoRA; run it in a suite that does (world_lora)")
    return found
