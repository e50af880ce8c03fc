"""SPPFT: freeze the middle layers.

Source: Safety Layers in Aligned LLMs (Li et al. 2024, arXiv 2408.17003): a contiguous block of
middle layers tells harmful prompts from others; freeze it and train the rest. The authors find the
block by perturbing layers, e.g. layers 9 to 14 of 32.

Fidelity: the block is given, not searched; the default is the same share of the depth (from 0.28 to
0.47), at least one layer. No safety data.
"""

from __future__ import annotations

import math
import re

from torch import nn

from benchmarks.collapse.methods.base import Method, Setup, Training, plain_adamw

_LAYER = re.compile(r"\.layers\.(\d+)\.")


def freeze_layers(model: nn.Module, first: float, last: float) -> list[int]:
    """Stop the layers at depths ``first`` to ``last`` from training, and return their numbers.

    A layer i of n is frozen when [i / n, (i + 1) / n) overlaps [first, last).

    Raises:
        ValueError: nothing is left to train, or the model has no numbered layers.
    """
    numbers = {name: _LAYER.search(f".{name}") for name, _ in model.named_parameters()}
    depth = 1 + max((int(m[1]) for m in numbers.values() if m), default=-1)
    if depth == 0:
        raise ValueError("no parameter is called '...layers.<number>...'; SPPFT needs layers")
    frozen = list(range(math.floor(first * depth + 1e-9), math.ceil(last * depth - 1e-9)))
    for name, p in model.named_parameters():
        match = numbers[name]
        if match and int(match[1]) in frozen:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("every parameter is frozen: choose a smaller block")
    return frozen


def build(setup: Setup) -> Method:
    """Options: ``first`` and ``last``, the block's depths as shares of the model's."""
    freeze_layers(setup.model, **({"first": 0.28, "last": 0.47} | dict(setup.options)))
    return Training(setup, plain_adamw(setup))
