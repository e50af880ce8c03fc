"""Scalars of one AdamW step, worked out once in double precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Rounding = Literal["nearest", "stochastic", "kahan"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


@dataclass(frozen=True)
class AdamW:
    r"""AdamW with decoupled weight decay, at step t (Loshchilov and Hutter 2019).

    .. math::
        m \leftarrow β_1 m + (1 - β_1) g, \quad v \leftarrow β_2 v + (1 - β_2) g^2

        s = -\mathrm{lr}\, λ\, p - \frac{\mathrm{lr}}{1 - β_1^t}
            \frac{m}{\sqrt{v} / \sqrt{1 - β_2^t} + ε}

    Attributes:
        lr: learning rate.
        beta1: decay rate of m.
        beta2: decay rate of v.
        eps: added to the denominator.
        weight_decay: λ.
        step: t, 1 in the first step.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    step: int = 1

    @property
    def decay(self) -> float:
        """Share of the weight that decays away."""
        return self.lr * self.weight_decay

    @property
    def step_size(self) -> float:
        """Learning rate over the first moment's bias correction."""
        return self.lr / (1 - self.beta1**self.step)

    @property
    def root_correction(self) -> float:
        """Square root of the second moment's bias correction."""
        return float((1 - self.beta2**self.step) ** 0.5)


@dataclass(frozen=True)
class Seed:
    """What the random bits of stochastic rounding depend on.

    The bits are Philox's: the same on every device, and the same whether a tensor is rounded
    alone or in a list.

    Attributes:
        seed: key of the generator, 64 bits.
        step: optimizer step, 32 bits.
    """

    seed: int = 0
    step: int = 0


def scalars(adamw: AdamW) -> tuple[float, ...]:
    """What kernels take: 1 - beta is worked out here, where it is exact."""
    return (
        adamw.decay,
        adamw.step_size,
        adamw.beta1,
        1 - adamw.beta1,
        adamw.beta2,
        1 - adamw.beta2,
        adamw.root_correction,
        adamw.eps,
    )
