"""The processes that train one model together: who measures what, who holds what.

Everything here is the identity in a single process. Collectives run in the same order on every
process, and what is decided from their results is decided alike everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
Parameters = Mapping[str, Tensor]


def is_dtensor(tensor: Tensor) -> bool:
    """True for a DTensor, which is what ``fully_shard`` makes of a parameter."""
    # Importing the module takes a third of a second, and without it no DTensor can exist.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, detached, sharing its memory."""
    # A gradient is detached already, and a step asks for every one of them several times.
    part: Any = tensor.detach() if tensor.requires_grad else tensor
    return part.to_local() if is_dtensor(part) else part  # type: ignore[no-any-return]


def reshard(model: nn.Module) -> None:
    """Let go of the whole parameters that ``fully_shard`` keeps after a forward without backward.

    Until then ``model.parameters()`` are not those that the optimizer moves.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return
    for part in model.modules():
        if isinstance(part, module.FSDPModule):
            part.reshard()


def process_group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The process group of a model under DistributedDataParallel, otherwise None."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            group: dist.ProcessGroup = inner.process_group
            return group
        inner = getattr(inner, "_orig_mod", None)  # torch.compile's wrapper
    return None


@dataclass(frozen=True)
class Rows:
    """The rows (dimension 0) of a parameter that this process holds.

    Attributes:
        start: first row.
        stop: one past the last row; equal to ``start`` where the shard is empty.
        total: rows of the whole parameter.
    """

    start: int
    stop: int
    total: int


@dataclass(frozen=True)
class Share:
    """One process's part of N anchors.

    Attributes:
        positions: which of the N this process measures; at least one, as all processes must run
            the same forwards.
        counts: how many of the N each process contributes, in order.
    """

    positions: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model together.

    Attributes:
        groups: process groups over which anchors are split, innermost first; none in a single
            process.
        shards: the group whose shards make up whole parameters; None where every process holds
            all of them.
        device: where collectives find their tensors.
    """

    groups: tuple[dist.ProcessGroup, ...] = ()
    shards: dist.ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, parameters: Parameters, group: dist.ProcessGroup | None = None) -> Ranks:
        """Find the processes of a model: those of its device mesh, otherwise ``group``.

        Args:
            parameters: the model's parameters, as they are sharded now.
            group: processes that hold the same weights.

        Raises:
            ValueError: parameters are sharded in a way that is not supported.
        """
        sharded = {name: p for name, p in parameters.items() if is_dtensor(p)}
        if sharded:
            return _of_mesh(sharded)
        if group is None:
            return cls()
        return cls((group,), None, next(iter(parameters.values())).device)

    @property
    def size(self) -> int:
        """Number of processes."""
        total = 1
        for group in self.groups:
            total *= group.size()
        return total

    @property
    def rank(self) -> int:
        """Number of this process among them."""
        number, width = 0, 1
        for group in self.groups:
            number, width = number + width * group.rank(), width * group.size()
        return number

    # -- anchors ---------------------------------------------------------------------------

    def share(self, count: int) -> Share:
        """Split ``count`` anchors into consecutive parts, as even as possible."""
        bounds = [count * r // self.size for r in range(self.size + 1)]
        counts = tuple(stop - start for start, stop in pairwise(bounds))
        mine = tuple(range(bounds[self.rank], bounds[self.rank + 1]))
        return Share(mine or (0,), counts)

    def gather(self, rows: Tensor, share: Share) -> Tensor:
        """Bring every process's anchors together along dimension 0, in order."""
        if not self.groups:
            return rows
        longest, mine = max(share.counts), share.counts[self.rank]
        gathered = rows.new_zeros(longest, *rows.shape[1:])
        gathered[:mine] = rows[:mine]
        for group in self.groups:
            gathered = torch.cat(_all_gather(gathered, group))
        kept = [r * longest + i for r, n in enumerate(share.counts) for i in range(n)]
        return gathered[torch.tensor(kept, device=gathered.device)]

    # -- agreement -------------------------------------------------------------------------

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every process; what it raises on one is raised on all."""
        if not self.groups:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        if not self._any(error is not None, self.groups):
            return result
        raise _first(self._all_objects(error)) from error

    def same(self, tensor: Tensor) -> Tensor:
        """The first process's values, for what all have measured up to rounding."""
        if not self.groups:
            return tensor
        agreed = tensor.to(self.device, copy=True)
        for group in self.groups:
            dist.broadcast(agreed, group=group, group_src=0)
        return agreed.to(tensor.device)

    def check_same(self, what: Any, complaint: str) -> None:
        """Raise if ``what`` does not read the same on every process.

        Raises:
            RuntimeError: with ``complaint``, on every process.
        """
        if self.groups and len({repr(other) for other in self._all_objects(what)}) > 1:
            raise RuntimeError(complaint)

    def _any(self, flag: bool, groups: Iterable[dist.ProcessGroup]) -> bool:
        value = torch.tensor(float(flag), device=self.device)
        for group in groups:
            dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
        return bool(value)

    def _all_objects(self, value: Any) -> list[Any]:
        found = [value]
        for group in self.groups:
            parts: list[Any] = [None] * group.size()
            dist.all_gather_object(parts, found, group=group)
            found = [item for part in parts for item in part]
        return found

    # -- shards ----------------------------------------------------------------------------

    def any_shard(self, flag: bool) -> bool:
        """True if ``flag`` is true for some shard of the parameters."""
        return flag if self.shards is None else self._any(flag, (self.shards,))

    def sum_shards(self, *partial: Tensor) -> tuple[Tensor, ...]:
        """Add up what each shard contributes, in one all-reduce; float64."""
        if self.shards is None:
            return partial
        flat = torch.cat([part.reshape(-1).double().to(self.device) for part in partial])
        dist.all_reduce(flat, group=self.shards)
        pieces = flat.split([part.numel() for part in partial])
        return tuple(
            piece.view(part.shape).to(part.device)
            for piece, part in zip(pieces, partial, strict=True)
        )

    def counted(self, parameters: Parameters) -> frozenset[str]:
        """The parameters whose part here enters the sums over shards.

        One that every process holds whole is counted by the first process alone.
        """
        if self.shards is None or self.shards.rank() == 0:
            return frozenset(parameters)
        return frozenset(name for name, p in parameters.items() if rows_of(p) is not None)

    def join(self, part: Tensor, dim: int, total: int) -> Tensor:
        """Put the shards' parts of a tensor together along ``dim``, ``total`` long."""
        assert self.shards is not None
        longest = -(-total // self.shards.size())
        padded = part.new_zeros(*part.shape[:dim], longest, *part.shape[dim + 1 :])
        padded.narrow(dim, 0, part.shape[dim]).copy_(part)
        return torch.cat(_all_gather(padded, self.shards), dim).narrow(dim, 0, total)


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def _first(errors: Sequence[Exception | None]) -> Exception:
    return next(error for error in errors if error is not None)


def _of_mesh(parameters: dict[str, Any]) -> Ranks:
    name, first = next(iter(parameters.items()))
    mesh, shard_dim = first.device_mesh, None
    for name, p in parameters.items():
        if p.device_mesh != mesh:
            raise ValueError(
                f"parameter {name!r} lives on another device mesh than the first one; a guard "
                "needs all sharded parameters on one mesh"
            )
        dims = [d for d, placement in enumerate(p.placements) if not placement.is_replicate()]
        if any(not p.placements[d].is_shard(0) for d in dims) or len(dims) > 1:
            raise ValueError(
                f"parameter {name!r} is placed as {p.placements}; a guard handles fully_shard by "
                "rows (dimension 0), with or without replicas, and no tensor parallelism"
            )
        if dims and shard_dim not in (None, dims[0]):
            raise ValueError(f"parameter {name!r} is sharded along another mesh dimension")
        shard_dim = dims[0] if dims else shard_dim
    groups = tuple(mesh.get_group(d) for d in reversed(range(mesh.ndim)))
    shards = None if shard_dim is None else mesh.get_group(shard_dim)
    device = torch.device(mesh.device_type)
    return Ranks(groups, shards, device)


def rows_of(parameter: Tensor) -> Rows | None:
    """Which rows of a sharded parameter this process holds; None if it holds all of it."""
    if not is_dtensor(parameter):
        return None
    sharded: Any = parameter
    for dim, placement in enumerate(sharded.placements):
        if placement.is_shard():
            total = int(sharded.shape[0])
            chunk = -(-total // sharded.device_mesh.size(dim))  # as torch.chunk, and so fully_shard
            start = min(total, chunk * sharded.device_mesh.get_local_rank(dim))
            return Rows(start, min(total, start + chunk), total)
    return None
