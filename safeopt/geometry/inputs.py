"""What the anchors feed into every matrix: second moments of inputs, and their bases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from safeopt.anchors import IGNORED, AnchorBatch, Anchors
from safeopt.geometry.capture import layer_input, logits_of
from safeopt.geometry.coverage import Site, device_of
from safeopt.isolation import autocast, undisturbed

Positions = Literal["all", "content", "reply"]


def token_weights(batch: AnchorBatch, positions: Positions, prefix: int) -> Tensor:
    """Weight of every token, (N, T): 1 over the anchor's number of chosen tokens, or 0.

    Args:
        batch: N anchors.
        positions: "all" tokens; "content", those after the prefix that all anchors share (chat
            templates and their attention sinks); "reply", those at which a reply token is
            predicted.
        prefix: length of the shared prefix.

    Raises:
        ValueError: an unknown choice.
    """
    if positions not in get_args(Positions):
        raise ValueError(f"positions must be one of {get_args(Positions)}, got {positions!r}")
    chosen = batch.attention_mask.bool().clone()
    if positions == "content":
        chosen[:, :prefix] = False
    elif positions == "reply":
        chosen[:, :-1] = batch.labels[:, 1:] != IGNORED
        chosen[:, -1] = False
    return chosen / chosen.sum(1, keepdim=True).clamp(min=1)


def shared_prefix(anchors: Anchors) -> int:
    """Number of leading tokens that are the same in all anchors; 0 for a single anchor."""
    if len(anchors) < 2:
        return 0
    columns = zip(*(row.tolist() for row in anchors.input_ids), strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), 0)


def _run(
    model: nn.Module, sites: Sequence[Site], batch: AnchorBatch, record: Callable[..., None]
) -> None:
    """One forward pass that leaves no trace; calls ``record(site, input)`` for each site."""

    def hook(site: Site) -> Callable[..., None]:
        def read(_: nn.Module, *given: Any) -> None:
            with autocast(model, {}):  # the model's forward may cast, and we are inside it
                record(site, layer_input(*given).detach())

        return read

    handles = [
        site.module.register_forward_pre_hook(hook(site), with_kwargs=True) for site in sites
    ]
    try:
        with undisturbed(model), torch.no_grad():
            logits_of(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def shared_inputs(model: nn.Module, sites: Sequence[Site], batch: AnchorBatch) -> dict[str, str]:
    """Map each site to the first site that reads the very same tensor (q, k, v; gate, up).

    Sites that a forward pass does not reach are absent.
    """
    readers: dict[str, list[Tensor]] = {}
    leaders: dict[int, str] = {}
    kept: list[Tensor] = []  # alive, so that no address is used twice

    def record(site: Site, tensor: Tensor) -> None:
        kept.append(tensor)
        readers.setdefault(site.name, []).append(tensor)

    _run(model, sites, batch, record)
    shared: dict[str, str] = {}
    for name, tensors in readers.items():
        first = tensors[0].data_ptr() if len(tensors) == 1 else id(tensors)
        shared[name] = leaders.setdefault(first, name)
    return shared


def second_moments(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[tuple[AnchorBatch, Tensor]],
    *,
    normalise: bool = True,
) -> dict[str, Tensor]:
    """Weighted second moments of what the sites' modules read, sum_t w_t x_t x_t^T.

    Args:
        model: the model, unwrapped; used in eval mode and left as it was.
        sites: modules of matrices.
        batches: anchors on the model's device and token weights, (N, T).
        normalise: give every token unit length first, so that attention sinks, a thousand times
            longer than other tokens, do not take the whole basis.

    Returns:
        Matrices (n, n) by site name, in fp32 or the model's own precision if that is higher.
    """
    moments: dict[str, Tensor] = {}

    def record(site: Site, tensor: Tensor, weights: Tensor) -> None:
        tokens = unit_tokens(tensor, weights, normalise)
        if site.name not in moments:
            moments[site.name] = tokens.new_zeros(tokens.shape[1], tokens.shape[1])
        moments[site.name].addmm_(tokens.T, tokens)

    for batch, weights in batches:
        _run(model, sites, batch, partial(record, weights=weights))
    return moments


def unit_tokens(tensor: Tensor, weights: Tensor, normalise: bool) -> Tensor:
    """Chosen tokens of a module's input, scaled by the root of their weight, (t, n).

    Raises:
        ValueError: the module folds the batch dimension away.
    """
    if tensor.shape[:2] != weights.shape:
        raise ValueError(
            f"a module read an input of shape {tuple(tensor.shape)} for {tuple(weights.shape)} "
            "anchor tokens, so that tokens cannot be told apart; expert layers are not supported"
        )
    chosen = weights > 0
    tokens = tensor[chosen]
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if normalise:
        tokens = torch.nn.functional.normalize(tokens, dim=-1)
    return tokens * weights[chosen].to(tokens).sqrt()[:, None]


LARGEST_RANK = 512
"""Directions per basis at most, unless asked otherwise: with all bases at it, a passport of
Llama-3.1-8B is 2.7 % of the fp32 weights, whatever the spectrum."""


@dataclass(frozen=True)
class InputBasis:
    """Principal directions of a second moment.

    Attributes:
        vectors: orthonormal, (n, r), by decreasing energy.
        energies: all eigenvalues as shares of their sum, largest first, (n,).
    """

    vectors: Tensor
    energies: Tensor

    @classmethod
    def of(cls, moment: Tensor, energy: float, rank: int | None) -> InputBasis:
        """The leading directions that hold ``energy`` of the trace, at most ``rank`` of them."""
        values, vectors = torch.linalg.eigh(moment)
        values = values.flip(0).clamp(min=0)
        shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        count = count_for(shares, energy)
        count = count if rank is None else min(count, rank)
        return cls(vectors.flip(1)[:, :count].contiguous(), shares)


def count_for(shares: Tensor, energy: float) -> int:
    """How many of the largest shares it takes to hold ``energy`` of their sum, in [0, 1].

    Shares that are zero in this precision are not counted.
    """
    present = int((shares > torch.finfo(shares.dtype).eps).sum())
    held = shares.cumsum(0) / shares.sum().clamp(min=torch.finfo(shares.dtype).tiny)
    return min(int((held < energy).sum()) + 1, present)


def captured(
    model: nn.Module,
    sites: Sequence[Site],
    bases: Mapping[str, Tensor],
    batches: Sequence[tuple[AnchorBatch, Tensor]],
    *,
    normalise: bool = True,
) -> Tensor:
    """Share of every anchor's input energy that the bases hold, mean over the sites, (N,).

    Args:
        model: the model, unwrapped.
        sites: modules of matrices.
        bases: orthonormal (n, r) by site name.
        batches: as in `second_moments`.
        normalise: as in `second_moments`.
    """
    results = []
    shares: list[Tensor] = []

    def record(site: Site, tensor: Tensor, weights: Tensor) -> None:
        tokens = unit_tokens(tensor, weights, normalise)
        anchor = (weights > 0).nonzero()[:, 0]
        held = _sums_by_anchor((tokens @ bases[site.name]).square().sum(1), anchor, len(weights))
        total = _sums_by_anchor(tokens.square().sum(1), anchor, len(weights))
        shares.append(held / total.clamp(min=torch.finfo(total.dtype).tiny))

    for batch, weights in batches:
        shares.clear()
        _run(model, sites, batch, partial(record, weights=weights))
        results.append(torch.stack(shares).mean(0))
    return torch.cat(results)


def _sums_by_anchor(values: Tensor, anchor: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add_(0, anchor, values)


def weighted_batches(
    model: nn.Module,
    anchors: Anchors,
    indices: Sequence[int],
    positions: Positions,
    batch_size: int,
) -> list[tuple[AnchorBatch, Tensor]]:
    """The chosen anchors in batches of similar length, with their token weights."""
    order = sorted(indices, key=lambda i: len(anchors.input_ids[i]))
    prefix, device = shared_prefix(anchors), device_of(model)
    batches = []
    for start in range(0, len(order), batch_size):
        batch = anchors.batch(order[start : start + batch_size]).to(device)
        batches.append((batch, token_weights(batch, positions, prefix)))
    return batches


def recorded_ids(
    model: nn.Module, tables: Sequence[Site], batches: Sequence[tuple[AnchorBatch, Tensor]]
) -> dict[str, Tensor]:
    """Rows of embedding tables that the chosen tokens read, by parameter name, sorted int64."""
    seen: dict[str, list[Tensor]] = {}

    def record(site: Site, tensor: Tensor, weights: Tensor) -> None:
        ids = tensor.expand(weights.shape) if tensor.shape != weights.shape else tensor
        seen.setdefault(site.parameters["weight"], []).append(ids[weights > 0].unique())

    for batch, weights in batches:
        _run(model, tables, batch, partial(record, weights=weights))
    return {name: torch.cat(ids).unique() for name, ids in seen.items()}
