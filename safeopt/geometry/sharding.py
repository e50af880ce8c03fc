"""A sketch whose anchors were measured on several processes, and whose parameters are sharded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.distributed import Parameters, Ranks, Rows, Share, rows_of
from safeopt.geometry.blocks import (
    Block,
    DenseBlock,
    LowRankBlock,
    RowsBlock,
    squared_norm,
    to_state,
)
from safeopt.geometry.gradient_sketch import GradientSketch


@dataclass(frozen=True)
class RowsShard(RowsBlock):
    """The rows of a `RowsBlock` that fall into one shard of the embedding table.

    Anchors have different numbers of tokens in a shard; shorter ones are padded with zero rows.

    Attributes:
        position: which of the anchor's tokens each row is, (N, T'); -1 on padding.
        length: T, tokens of an anchor before the cut.
    """

    position: Tensor
    length: int


class Coordinates:
    """c = G x and ||x||^2 of a vector x over all parameters, taken in one parameter at a time.

    Args:
        sketch: the anchors' gradients G, of the rows that are here.
        ranks: the processes that hold the other rows.
        counted: the parameters whose part here enters sums over those processes.

    Attributes:
        coefficients: c, (N,), float64.
        squared_norm: ||x||^2.
    """

    def __init__(self, sketch: GradientSketch, ranks: Ranks, counted: frozenset[str]) -> None:
        self._sketch, self._ranks, self._counted = sketch, ranks, counted
        losses = sketch.losses
        self.coefficients = torch.zeros(len(losses), dtype=torch.float64, device=losses.device)
        self.squared_norm = 0.0

    def add(self, name: str, part: Tensor) -> None:
        """Take in one parameter's part of x, the rows that are here."""
        if self.counts(name):
            self.take(self._sketch.coefficients({name: part}), squared_norm(part))

    def counts(self, name: str) -> bool:
        """True if the part of a parameter that is here enters the sums over processes."""
        return name in self._counted

    def take(self, coefficients: Tensor, squared_norm: float) -> None:
        """Take in what some parts add to c and to ||x||^2."""
        self.coefficients += coefficients
        self.squared_norm += squared_norm

    def sum_shards(self) -> None:
        """Put together what every process has taken in: one all-reduce of N + 1 floats."""
        norm = torch.tensor(self.squared_norm, dtype=torch.float64)
        self.coefficients, norm = self._ranks.sum_shards(self.coefficients, norm)
        self.squared_norm = float(norm)

    @property
    def norm(self) -> float:
        """||x||."""
        return math.sqrt(self.squared_norm)


def gather(
    sketch: GradientSketch, share: Share, ranks: Ranks, parameters: Parameters
) -> GradientSketch:
    """Bring the anchors of every process together and keep this process's shard of the result.

    One parameter after another, so that no more than one is ever whole.

    Raises:
        RuntimeError: processes have measured different modules.
    """
    if not ranks.groups:
        return sketch
    layout = [
        (name, type(block).__name__, [tuple(t.shape[1:]) for t in to_state(block).values()])
        for name, blocks in sketch.blocks.items()
        for block in blocks
    ]
    ranks.check_same(
        layout,
        "the anchors of different processes ran through different modules of the model, so their "
        "gradients cannot be put together; give every process the same modules",
    )

    def gathered(name: str, block: Block) -> Block:
        fields = {key: ranks.gather(value, share) for key, value in to_state(block).items()}
        return keep_rows(type(block)(**fields), rows_of(parameters[name]))

    losses = ranks.gather(sketch.losses, share)
    return _mapped(sketch, gathered, losses, ranks.gather(sketch.captured_energy, share))


def keep(sketch: GradientSketch, parameters: Parameters) -> GradientSketch:
    """Cut a sketch of whole parameters down to the rows that this process holds of them."""
    return _mapped(sketch, lambda name, block: keep_rows(block, rows_of(parameters[name])))


def whole(sketch: GradientSketch, ranks: Ranks, parameters: Parameters) -> GradientSketch:
    """Undo `keep`: the same sketch on every process, for a checkpoint. A collective."""

    def joined(name: str, block: Block) -> Block:
        rows = rows_of(parameters[name])
        return block if rows is None else _join(block, rows, ranks)

    return _mapped(sketch, joined)


def gram(sketch: GradientSketch, ranks: Ranks, parameters: Parameters) -> tuple[Tensor, bool]:
    """K = G G^T, (N, N), of the whole parameters, and whether some parameter has no gradient.

    K is a sum over rows of the parameters, so every process adds up its own and one all-reduce
    does the rest.
    """
    own = _counted(sketch, ranks, parameters)
    total, bounds = ranks.sum_shards(own.gram(), sketch.bounds())
    return total, bool((bounds == 0).any())


def _counted(sketch: GradientSketch, ranks: Ranks, parameters: Parameters) -> GradientSketch:
    """The blocks that this process contributes to sums over shards."""
    names = ranks.counted(parameters)
    blocks = {name: b for name, b in sketch.blocks.items() if name in names}
    return GradientSketch(blocks, sketch.losses, sketch.captured_energy)


def _mapped(
    sketch: GradientSketch,
    change: Callable[[str, Block], Block],
    losses: Tensor | None = None,
    energy: Tensor | None = None,
) -> GradientSketch:
    blocks = {
        name: tuple(change(name, block) for block in parameter_blocks)
        for name, parameter_blocks in sketch.blocks.items()
    }
    return GradientSketch(
        blocks,
        sketch.losses if losses is None else losses,
        sketch.captured_energy if energy is None else energy,
    )


def keep_rows(block: Block, rows: Rows | None) -> Block:
    """The part of a block that belongs to some rows of its parameter; all of it for None."""
    if rows is None:
        return block
    if isinstance(block, LowRankBlock):
        return LowRankBlock(block.left[..., rows.start : rows.stop].contiguous(), block.right)
    if isinstance(block, DenseBlock):
        kept = block.rows.unflatten(1, (rows.total, -1))[:, rows.start : rows.stop]
        return DenseBlock(kept.flatten(1))
    assert isinstance(block, RowsBlock)
    return _keep_tokens(block, rows)


def _keep_tokens(block: RowsBlock, rows: Rows) -> RowsShard:
    inside = (block.ids >= rows.start) & (block.ids < rows.stop)
    longest = int(inside.sum(1).max())
    order = inside.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    is_padding = ~inside.gather(1, order)
    ids = (block.ids.gather(1, order) - rows.start).masked_fill(is_padding, 0)
    values = block.rows.gather(1, order[..., None].expand(-1, -1, block.rows.shape[-1]))
    return RowsShard(
        ids,
        values.masked_fill(is_padding[..., None], 0.0),
        order.masked_fill(is_padding, -1),
        block.ids.shape[1],
    )


def _join(block: Block, rows: Rows, ranks: Ranks) -> Block:
    if isinstance(block, LowRankBlock):
        return LowRankBlock(ranks.join(block.left, 2, rows.total), block.right)
    if isinstance(block, DenseBlock):
        by_row = block.rows.view(len(block.rows), rows.stop - rows.start, -1)
        return DenseBlock(ranks.join(by_row, 1, rows.total).flatten(1))
    assert isinstance(block, RowsShard)
    anchors, slots = torch.nonzero(block.position >= 0, as_tuple=True)
    where = anchors, block.position[anchors, slots]
    ids = block.ids.new_zeros(len(block.ids), block.length)
    values = block.rows.new_zeros(*ids.shape, block.rows.shape[-1])
    ids[where], values[where] = block.ids[anchors, slots] + rows.start, block.rows[anchors, slots]
    all_ids, all_values = ranks.sum_shards(ids, values)
    return RowsBlock(all_ids.to(ids), all_values.to(values))
