"""What the processes of the distributed tests do: build a guarded model, train it, report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import safeopt
from tests.zoo import ARCHITECTURES, VOCABULARY, random_anchors

# Machine-dependent, or of this process's shard alone.
OWN_FIGURES = {"safety/refresh_ms", "safety/step_ms", "safety/sketch_mb"}
GUARD = {"budget": -0.3, "step_limit": 0.25, "refresh_every": 3, "anchors_per_refresh": 4}


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ in ("LlamaDecoderLayer", "GPT2Block")]


def shard(model: nn.Module, shape: tuple[int, ...] | None = None) -> nn.Module:
    """``fully_shard`` over all ranks, or over the last dimension of a mesh of ``shape``."""
    shape = shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrap(kind: str, model: nn.Module) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp":
        return shard(model)
    if kind == "hsdp":
        return shard(model, (2, dist.get_world_size() // 2))
    return model


class Training:
    """A guarded model and its batches, the same on every rank for the same seed."""

    def __init__(
        self,
        kind: str,
        architecture: str = "llama",
        seed: int = 0,
        steps: int = 5,
        prepare: Callable[[nn.Module], None] | None = None,
        **guard: Any,
    ) -> None:
        torch.manual_seed(seed)
        bare = ARCHITECTURES[architecture]()
        anchors = random_anchors(7)
        self.batches = [torch.randint(0, VOCABULARY, (12, 10)) for _ in range(steps)]
        for module in bare.modules():
            if isinstance(module, nn.Dropout):  # every rank would draw its own
                module.p = 0.0
        if prepare is not None:
            prepare(bare)
        self.model = wrap(kind, bare)
        self.guard = safeopt.Guard(self.model, anchors, **{**GUARD, **guard})
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        # A large eps: the sum over ranks rounds differently, and Adam blows up rounding errors
        # in gradients that are next to nothing.
        self.optimizer = safeopt.SafeAdamW(
            trained, lr=2e-3, eps=1e-3, weight_decay=0.1, guard=self.guard
        )
        self.figures: list[dict[str, float]] = []

    def backward(self, batch: Tensor, parts: int = 1) -> None:
        """Gradient of the mean loss over the batch, of which each rank computes its share."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        size = len(batch) // world
        for part in batch[rank * size : (rank + 1) * size].chunk(parts):
            loss = self.model(input_ids=part, labels=part).loss * len(part) / size
            loss.backward()

    def train(self, start: int = 0, stop: int | None = None) -> Training:
        for batch in self.batches[start:stop]:
            self.optimizer.zero_grad()
            self.backward(batch)
            self.optimizer.step()
            figures = self.guard.metrics()
            self.figures.append({k: v for k, v in figures.items() if k not in OWN_FIGURES})
        return self

    def weights(self) -> dict[str, Tensor]:
        return {
            name.removeprefix("module."): whole(value).clone()
            for name, value in self.model.state_dict().items()
        }


def whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return tensor.detach() if full is None else full().detach()


Report = tuple[dict[str, Tensor], list[dict[str, float]]]


def train(kind: str, architecture: str = "llama", **options: Any) -> Report:
    training = Training(kind, architecture, **options).train()
    return training.weights(), training.figures


def assert_equal(found: Report, expected: Report, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=atol)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=atol, atol=atol)
