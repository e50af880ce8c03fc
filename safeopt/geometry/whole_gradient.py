"""Whether the calls that hooks have seen explain the whole gradient that autograd returns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from safeopt.distributed import is_dtensor
from safeopt.geometry.blocks import Block

_VECTORS = 8
# What is missed counts above these shares of the parameter's gradient and of all gradients: less
# is rounding, which is all there is of some gradients (of a key's bias under softmax).
_OF_PARAMETER, _OF_ALL = 0.1, 1e-3


class WholeGradient:
    """The sum of the anchors' gradients G_i, as autograd returns it for each parameter.

    A weight that is used without its module, as in ``h @ embed.weight.T``, calls no hook, and a
    sketch lacks that use. A gradient, as a matrix W with n columns, is kept as W V with V Gaussian,
    (n, 8), whose norm estimates that of W: so no more than one whole gradient exists at a time.

    Args:
        parameters: by name; none of them sharded.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._images = {
            name: torch.zeros(_shape(p)[0], _VECTORS, device=p.device)
            for name, p in parameters.items()
        }

    @classmethod
    def of(cls, model: nn.Module, names: frozenset[str]) -> WholeGradient:
        """Of the named parameters of a model; of none if some are sharded."""
        chosen = {name: p for name, p in model.named_parameters() if name in names}
        return cls({} if any(is_dtensor(p) for p in chosen.values()) else chosen)

    @contextmanager
    def taken(self) -> Iterator[list[Tensor]]:
        """Yield the parameters, and take in the gradients that the body computes of them.

        Hooks that the parameters have of their own do not see these gradients.
        """
        hooks = [(p, p._backward_hooks) for p in self._parameters.values()]
        try:
            for name, p in self._parameters.items():
                p._backward_hooks = None
                p.register_hook(partial(self._take, name))
            yield list(self._parameters.values())
        finally:
            for p, theirs in hooks:
                p._backward_hooks = theirs

    def _take(self, name: str, gradient: Tensor | None) -> Tensor | None:
        """Keep the image of a gradient, and give autograd zeros that take no memory to return."""
        if gradient is None:  # an operator without a backward pass lies on the only way to it
            return None
        whole = gradient.to_dense() if gradient.is_sparse else gradient
        self._images[name] = whole.float().reshape(_shape(whole)) @ _vectors(whole)
        return None if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

    def check(self, blocks: Iterable[tuple[str, Block]], dtypes: set[torch.dtype]) -> None:
        """Raise if blocks, by parameter name, do not add up to the gradients.

        Args:
            blocks: every use of every parameter, uncompressed.
            dtypes: of the gradients that autograd has passed on: fp16 loses what is below 6e-8.

        Raises:
            ValueError: names the parameters.
        """
        norms = {name: float(image.norm()) for name, image in self._images.items()}
        smallest = max((_smallest(dtype) for dtype in dtypes), default=0.0)
        wrong = []
        for name, missed in self._missed(blocks).items():
            lost = smallest * math.sqrt(self._parameters[name].numel())
            # NaN comes first, so that it wins and is left to the look at the Gram matrix.
            limit = max(_OF_ALL * math.hypot(*norms.values()), _OF_PARAMETER * norms[name], lost)
            if float(missed.norm()) > limit:
                wrong.append(name)
        if wrong:
            raise ValueError(
                f"the calls of their modules do not explain the gradients of {wrong}: a weight is "
                "used without calling its module (as in h @ embed.weight.T), or a layer computes "
                "more than its class does; call the module instead of using its weight, or stop "
                "these parameters from training with requires_grad_(False)"
            )

    def _missed(self, blocks: Iterable[tuple[str, Block]]) -> dict[str, Tensor]:
        """The images less what the blocks explain of them."""
        missed = {name: image.clone() for name, image in self._images.items()}
        for name, block in blocks:
            if name in missed:
                image = block.times(_vectors(self._parameters[name]))
                image.subtract_(missed[name], missed[name].new_ones(len(image)))
        return missed


def _shape(parameter: Tensor) -> tuple[int, int]:
    """Of a parameter as a matrix."""
    width = parameter.shape[-1] if parameter.ndim else 1
    return parameter.numel() // max(width, 1), width


def _vectors(parameter: Tensor) -> Tensor:
    """V for a parameter, the same for all of one width."""
    _, width = _shape(parameter)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(width, _VECTORS, generator=generator, device="cpu") / math.sqrt(_VECTORS)
    return vectors.to(parameter.device)


def _smallest(dtype: torch.dtype) -> float:
    """The smallest number above zero."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
