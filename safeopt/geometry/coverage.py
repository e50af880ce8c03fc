"""Which module computes with which trainable parameter, and by what rule it is covered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

Rule = Literal["linear", "conv1d", "embedding", "small"]
Uncovered = Literal["error", "ignore", "freeze"]

# A parameter without a factored form is kept densely, N times; above this it is not covered.
SMALL_PARAMETER = 1 << 18

# What a layer's rule knows. A layer may own more: loralib's lora_A, weight_norm's weight_g.
_KNOWN: dict[Rule, tuple[str, ...]] = {
    "linear": ("weight", "bias"),
    "conv1d": ("weight", "bias"),
    "embedding": ("weight",),
}


@dataclass(frozen=True)
class Site:
    """A module that computes with trainable parameters of its own.

    Attributes:
        name: the module's name in the model.
        module: the module.
        rule: how its per-anchor gradients are formed.
        parameters: local name ("weight") to the model's name of each covered parameter.
    """

    name: str
    module: nn.Module
    rule: Rule
    parameters: dict[str, str]


@dataclass(frozen=True)
class Coverage:
    """The sites of a model and the trainable parameters that no rule covers."""

    sites: tuple[Site, ...]
    uncovered: tuple[str, ...]

    @property
    def covered(self) -> frozenset[str]:
        """Names of the covered parameters."""
        return frozenset(name for site in self.sites for name in site.parameters.values())

    def check_complete(self) -> None:
        """Raise `ValueError` if a trainable parameter has no rule."""
        if self.uncovered:
            raise ValueError(
                f"no rule covers the trainable parameters {list(self.uncovered)}; pass "
                "uncovered='freeze' to stop them from training or uncovered='ignore' to train "
                "them unguarded"
            )


def find_coverage(model: nn.Module, only: frozenset[str] | None = None) -> Coverage:
    """Find a rule for every trainable parameter of ``model``.

    Args:
        model: the model, unwrapped.
        only: consider just these parameters (those that an optimizer moves).
    """
    names = {
        id(p): name
        for name, p in model.named_parameters()
        if p.requires_grad and (only is None or name in only)
    }
    sites: list[Site] = []
    uncovered: list[str] = []
    never_called = _never_called(model)
    for module_name, module in model.named_modules():
        own = {
            local: names[id(p)]
            for local, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(p) in names
        }
        if not own:
            continue
        rule = None if module in never_called else _rule(module)
        known = () if rule is None else _KNOWN.get(rule, tuple(own))
        uncovered += [name for local, name in own.items() if local not in known]
        if rule is not None:
            sites.append(Site(module_name, module, rule, own))
    kept = (_covering(site, uncovered) for site in sites)
    return Coverage(tuple(s for s in kept if s.parameters), tuple(dict.fromkeys(uncovered)))


def _covering(site: Site, uncovered: list[str]) -> Site:
    """The site without what is not covered, there or at another use of it."""
    own = {local: name for local, name in site.parameters.items() if name not in uncovered}
    return replace(site, parameters=own)


def _never_called(model: nn.Module) -> set[nn.Module]:
    """Modules whose parameters another one uses without calling them."""
    return {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}


def _rule(module: nn.Module) -> Rule | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if _is_transposed_linear(module):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        return None if module.max_norm is not None or module.scale_grad_by_freq else "embedding"
    if isinstance(module, (nn.ParameterDict, nn.ParameterList)):
        return None  # never called, so nothing could be recorded: adapters on embeddings, IA3
    is_leaf = next(module.children(), None) is None
    sizes = [p.numel() for p in module.parameters(recurse=False)]
    return "small" if is_leaf and max(sizes) <= SMALL_PARAMETER else None


def _is_transposed_linear(module: nn.Module) -> bool:
    """True for GPT-2's linear layer, also under the subclass that ``fully_shard`` makes of it."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__) and hasattr(module, "nf")


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the parameters that require a gradient."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def prepare(model: nn.Module, uncovered: Uncovered = "error") -> None:
    """Freeze what no rule covers if ``uncovered`` is "freeze"; raise if nothing is to train."""
    if not trainable_names(model):
        raise ValueError(
            "no parameter of the model requires a gradient: there is nothing to guard; "
            "unfreeze what you want to train before building the guard"
        )
    if uncovered == "freeze":
        freeze(model, find_coverage(model).uncovered)


def freeze(model: nn.Module, names: tuple[str, ...]) -> None:
    """Stop the named parameters from training."""
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module under DistributedDataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter."""
    return next(model.parameters()).device
