"""GradientSketch: the anchors' gradients of every trainable parameter, kept factored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from safeopt.anchors import AnchorBatch
from safeopt.geometry.blocks import (
    Block,
    DenseBlock,
    LowRankBlock,
    RowsBlock,
    cross_gram,
    from_state,
    to_state,
)
from safeopt.geometry.capture import AnchorLoss, CapturedCall, capture, layer_input
from safeopt.geometry.compression import Factors, compress
from safeopt.geometry.coverage import Coverage, Site
from safeopt.geometry.moves import Eigenbasis
from safeopt.geometry.subspace import EIGENVALUE_FLOOR, check_all_there
from safeopt.geometry.whole_gradient import WholeGradient


@dataclass(frozen=True)
class GradientSketch:
    """Gradients G (N x P) of N anchor losses, as factored blocks per parameter.

    G G^T / N and G^T G / N share their eigenvalues, so the N x N Gram matrix carries the
    spectrum of the anchors' empirical Fisher. G itself is never formed.

    Attributes:
        blocks: blocks of each parameter by its name; two of them for a tied embedding.
        losses: anchor losses at the weights where the sketch was taken, (N,).
        captured_energy: ||compressed G_i||^2 / ||G_i||^2 per anchor, over the matrices, (N,).
    """

    blocks: Mapping[str, tuple[Block, ...]]
    losses: Tensor
    captured_energy: Tensor

    @classmethod
    @torch.no_grad()  # apart from the anchors' own forward-backward
    def measure(
        cls,
        model: nn.Module,
        coverage: Coverage,
        batch: AnchorBatch,
        loss: AnchorLoss,
        *,
        compression_rank: int | None = 8,
        verify: bool = False,
    ) -> GradientSketch:
        """Measure the sketch with one batched forward-backward.

        Args:
            model: the model, unwrapped.
            coverage: its sites, from `find_coverage`.
            batch: N anchors on the model's device.
            loss: maps logits (N, T, V) and labels (N, T) to losses (N,).
            compression_rank: singular directions kept per anchor and matrix; None keeps the
                exact token factors.
            verify: hold the gradients, added up over the anchors, to those that autograd returns;
                not with sharded parameters. It takes the gradient of one parameter at a time.

        Raises:
            FloatingPointError: an anchor's loss or gradient is not finite.
            ValueError: ``verify`` finds a parameter that is used without its module.
        """
        whole = WholeGradient.of(model, coverage.covered if verify else frozenset())
        losses, calls = capture(model, coverage.sites, batch, loss, whole)
        small, factors = _split_by_form(coverage.sites, calls)
        uses = [*small, *((name, LowRankBlock(f.left, f.right)) for name, f in factors)]
        whole.check(uses, {call.gradient.dtype for site_calls in calls for call in site_calls})
        names, pairs = [name for name, _ in factors], [pair for _, pair in factors]
        if compression_rank is not None:
            pairs = compress(pairs, compression_rank)
        blocks: dict[str, list[Block]] = {}
        for name, block in small:
            blocks.setdefault(name, []).append(block)
        for name, pair in zip(names, pairs, strict=True):
            blocks.setdefault(name, []).append(LowRankBlock(pair.left, pair.right))
        energy = _captured_energy(pairs, losses)
        return cls({name: tuple(b) for name, b in blocks.items()}, losses, energy)

    def __len__(self) -> int:
        return len(self.losses)

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return sum(block.nbytes for blocks in self.blocks.values() for block in blocks)

    def gram(self) -> Tensor:
        """Return K = G G^T, (N, N), accumulated in float64."""
        n = len(self)
        total = torch.zeros(n, n, dtype=torch.float64, device=self.losses.device)
        for blocks in self.blocks.values():
            for i, block in enumerate(blocks):
                total += block.gram()
                for other in blocks[i + 1 :]:
                    cross = cross_gram(block, other)
                    total += cross + cross.T
        return total

    def coefficients(self, step: Mapping[str, Tensor]) -> Tensor:
        """Return G s, (N,) in float64: the first-order change of the anchor losses along s.

        Args:
            step: displacement by parameter name; parameters that are absent do not move.
        """
        total = torch.zeros(len(self), dtype=torch.float64, device=self.losses.device)
        for name, delta in step.items():
            for block in self.blocks.get(name, ()):
                total += block.coefficients(delta)
        return total

    def subtract_(self, step: Mapping[str, Tensor], weights: Tensor) -> None:
        """Write s -= G^T a in place.

        Args:
            step: tensors by parameter name, written in place.
            weights: a, (N,).
        """
        for name, delta in step.items():
            for block in self.blocks.get(name, ()):
                block.subtract_(delta, weights)

    def remove_(
        self, step: Mapping[str, Tensor], rank: int | None = None, floor: float = EIGENVALUE_FLOOR
    ) -> None:
        """Write s <- s - P s in place, P on the leading eigenvectors of G^T G.

        Args:
            step: tensors of all the sketch's parameters by name; zeros for those that do not move,
                since P moves them too.
            rank: most directions; all above the floor by default.
            floor: smallest eigenvalue that counts, relative to the largest.

        Raises:
            ValueError: a parameter is missing.
        """
        check_all_there(self.blocks, step)
        basis = Eigenbasis.of(self.gram(), rank, floor)
        self.subtract_(step, basis.tangent_weights(self.coefficients(step)))

    def spectrum(self) -> Tensor:
        """Eigenvalues of the empirical Fisher G^T G / N, largest first, (N,)."""
        eigenvalues: Tensor = torch.linalg.eigvalsh(self.gram())
        return eigenvalues.flip(0).clamp(min=0) / len(self)

    def bounds(self) -> Tensor:
        """Return an upper bound on each parameter's gradient norms; 0 only if they are 0."""
        sums = [torch.stack([b.bound() for b in blocks]).sum() for blocks in self.blocks.values()]
        return torch.stack(sums)

    def to(self, device: torch.device) -> GradientSketch:
        """Return the same sketch on ``device``."""
        blocks = {
            name: tuple(
                from_state({key: value.to(device) for key, value in to_state(block).items()})
                for block in parameter_blocks
            )
            for name, parameter_blocks in self.blocks.items()
        }
        return GradientSketch(blocks, self.losses.to(device), self.captured_energy.to(device))

    def state_dict(self) -> dict[str, Any]:
        """Tensors by parameter name and block number, for a checkpoint."""
        blocks = {
            name: {str(i): to_state(block) for i, block in enumerate(parameter_blocks)}
            for name, parameter_blocks in self.blocks.items()
        }
        return {"blocks": blocks, "losses": self.losses, "captured_energy": self.captured_energy}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> GradientSketch:
        """Rebuild a sketch from `state_dict`."""
        blocks = {
            name: tuple(from_state(block) for block in parameter_blocks.values())
            for name, parameter_blocks in state["blocks"].items()
        }
        return cls(blocks, state["losses"], state["captured_energy"])


def _split_by_form(
    sites: tuple[Site, ...], calls: list[list[CapturedCall]]
) -> tuple[list[tuple[str, Block]], list[tuple[str, Factors]]]:
    blocks: list[tuple[str, Block]] = []
    factors: list[tuple[str, Factors]] = []
    for site, site_calls in zip(sites, calls, strict=True):
        if not site_calls:  # not reached by these anchors: its gradient is zero
            continue
        if site.rule == "embedding":
            blocks.append((site.parameters["weight"], _rows(site.module, site_calls)))
        elif site.rule == "small":
            blocks += _small_blocks(site, site_calls)
        else:
            if "weight" in site.parameters:
                factors.append((site.parameters["weight"], _token_factors(site, site_calls)))
            if "bias" in site.parameters:
                blocks.append((site.parameters["bias"], _bias(site_calls)))
    return blocks, factors


def _tokens(x: Tensor) -> Tensor:
    """Fold everything between the anchor and the feature dimension into tokens: (N, T, d)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _join(tensors: list[Tensor]) -> Tensor:
    """Concatenate the tokens of a module's calls in fp32; most modules are called once."""
    joined = _tokens(tensors[0]) if len(tensors) == 1 else torch.cat(list(map(_tokens, tensors)), 1)
    return joined.float()


def _token_factors(site: Site, calls: list[CapturedCall]) -> Factors:
    inputs = _join(_inputs(calls))
    gradients = _join([call.gradient for call in calls])
    if site.rule == "conv1d":
        return Factors(left=inputs, right=gradients)
    return Factors(left=gradients, right=inputs)


def _bias(calls: list[CapturedCall]) -> DenseBlock:
    return DenseBlock(_join([call.gradient for call in calls]).sum(1))


def _inputs(calls: list[CapturedCall]) -> list[Tensor]:
    return [layer_input(call.inputs, call.keywords) for call in calls]


def _rows(module: nn.Module, calls: list[CapturedCall]) -> RowsBlock:
    ids = torch.cat([ids.flatten(1) for ids in _inputs(calls)], dim=1)
    rows = _join([call.gradient for call in calls])
    scale = getattr(module, "embed_scale", None)  # transformers multiply what is looked up by it
    if scale is not None:
        rows = rows * torch.as_tensor(scale).to(rows.device, calls[0].gradient.dtype)
    padding = getattr(module, "padding_idx", None)
    if padding is not None:  # autograd gives the padding row no gradient
        rows = rows.masked_fill((ids == padding)[..., None], 0.0)
    return RowsBlock(ids, rows)


def _small_blocks(site: Site, calls: list[CapturedCall]) -> list[tuple[str, Block]]:
    totals: dict[str, Tensor] = {}
    for call in calls:
        for name, rows in _per_anchor_vjp(site, call).items():
            totals[name] = totals[name] + rows if name in totals else rows
    return [(site.parameters[local], DenseBlock(rows)) for local, rows in totals.items()]


class _WithoutHooks(nn.Module):
    """A module's own forward: what was captured lies inside its hooks, ``fully_shard``'s too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        return self.module.forward(*inputs, **keywords)


def _per_anchor_vjp(site: Site, call: CapturedCall) -> dict[str, Tensor]:
    """Replay one small module per anchor: the rule that covers any norm, scale or bias."""
    bare = _WithoutHooks(site.module)
    parameters = {f"module.{local}": value for local, value in call.parameters.items()}
    count = call.gradient.shape[0]
    given = [*call.inputs, *call.keywords.values()]
    is_batched = [isinstance(x, Tensor) and x.shape[:1] == (count,) for x in given]

    def one_anchor(gradient: Tensor, *values: Any) -> dict[str, Tensor]:
        rows = [x.unsqueeze(0) if row else x for x, row in zip(values, is_batched, strict=True)]
        inputs = tuple(rows[: len(call.inputs)])
        keywords = dict(zip(call.keywords, rows[len(call.inputs) :], strict=True))

        def run(values: dict[str, Tensor]) -> Tensor:
            output: Tensor = functional_call(bare, values, inputs, keywords)
            return output

        output, pullback, *_ = vjp(run, parameters)
        result: dict[str, Tensor] = pullback(gradient.unsqueeze(0).to(output.dtype))[0]
        return result

    dims = (0, *(0 if row else None for row in is_batched))
    gradients = vmap(one_anchor, in_dims=dims)(call.gradient, *given)
    return {
        local: gradients[f"module.{local}"].reshape(count, -1).float() for local in site.parameters
    }


def _captured_energy(factors: list[Factors], losses: Tensor) -> Tensor:
    if not factors or factors[0].energy is None:
        return torch.ones_like(losses)
    kept = sum(LowRankBlock(f.left, f.right).gram().diagonal() for f in factors)
    total = sum(f.energy for f in factors if f.energy is not None)
    assert isinstance(kept, Tensor)
    assert isinstance(total, Tensor)
    return kept / total.clamp(min=torch.finfo(torch.float32).tiny)
