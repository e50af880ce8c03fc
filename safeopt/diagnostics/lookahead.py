"""Look-ahead: how the optimizer's own next steps move the anchors, by forward passes alone.

Along the planned path an anchor's loss is l_i(t) = l_i + v_i t + 1/2 Gamma_i t^2 + 1/6 J_i t^3 with
t in planned steps. Losses after 0, h, 2h and 3h steps, and one more on the straight line, give v,
Gamma and J without a derivative of the anchors. Gamma holds the task's curvature and the level
set's together, whatever the optimizer does to the gradient. (For plain SGD it is the total of
`safeopt.curvature.acceleration`.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.curvature.vectors import Vector, displace, restored
from safeopt.diagnostics.verdict import Verdict

Step = Callable[[], None]


@dataclass(frozen=True)
class Law:
    """What the first steps say of the way ahead.

    Attributes:
        velocity: v, change of each anchor's loss in a planned step, nats, less 1/2 Gamma's part
            that turns the path, which begins with the second step, (N,).
        acceleration: Gamma, nats per planned step squared, (N,).
        jerk: J, nats per planned step cubed, (N,).
    """

    velocity: Tensor
    acceleration: Tensor
    jerk: Tensor

    def rises(self, steps: float) -> Tensor:
        """l_i(t) - l_i(0) to second order, nats, (N,)."""
        return self.velocity * steps + 0.5 * self.acceleration * steps**2

    def drift(self, steps: float) -> float:
        """1/2 mean_i (v_i t + 1/2 Gamma_i t^2)^2, nats squared: 1/2 ||F^(1/2) delta||^2.

        With v = 0 it is t^4/8 mean Gamma_i^2, the quartic onset of Springer et al. 2026, with the
        level set's curvature in Gamma.
        """
        return float(0.5 * self.rises(steps).square().mean())

    def error(self, steps: float) -> float:
        """Relative error of `drift` that the third order gives: 2 ||J t^3/6|| / ||rises||."""
        cubic, known = (self.jerk * steps**3 / 6).norm(), self.rises(steps).norm()
        return float(2 * cubic / known) if float(known) > 0 else math.inf

    def window(self, error: float = 0.1, limit: float = 1e6) -> float:
        """Planned steps within which `error` stays below ``error``; 0 if it does nowhere.

        The look is coarse, a tenth of a decade at a time, from the second planned step on, and
        ends where the error first passes ``error``.
        """
        held = 0.0
        for exponent in range(3, round(10 * math.log10(limit)) + 1):
            steps = 10 ** (exponent / 10)
            if self.error(steps) > error:
                break
            held = steps
        return held

    def judge(self, steps: float, limit: float, error: float = 0.1) -> Verdict:
        """Whether the drift stays below ``limit`` nats squared over ``steps`` planned steps.

        INCONCLUSIVE beyond the window; CAUTION where the error decides.
        """
        if steps > self.window(error):
            return Verdict.INCONCLUSIVE
        if self.drift(steps) * (1 - error) > limit:
            return Verdict.NO_GO
        return Verdict.GO if self.drift(steps) * (1 + error) <= limit else Verdict.CAUTION


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Estimate:
        """Mean of samples, one a batch, with a percentile bootstrap over them."""
        values = torch.tensor(samples, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        picks = torch.randint(len(values), (1000, len(values)), generator=generator)
        tail = (1 - confidence) / 2
        ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
        low, high = values[picks].mean(1).quantile(ends).tolist()
        return cls(float(values.mean()), low, high)


def look_ahead(
    parameters: Vector,
    losses: Callable[[], Tensor],
    paths: Sequence[Step],
    *,
    stride: float = 1.0,
    before: Tensor | None = None,
) -> list[Law]:
    """One law a path.

    Args:
        parameters: the weights that the steps move; put back bit for bit.
        losses: the anchor losses at the present weights, (N,).
        paths: each makes one optimizer step of its path when called, on a batch of its own.
        stride: h, planned steps that one of theirs stands for: steps at h times the planned rate
            stand out of rounding where single ones do not.
        before: the losses before any step, where they are known.
    """
    start = (losses() if before is None else before).double()
    return [_law(parameters, losses, step, start, stride) for step in paths]


def _law(
    parameters: Vector, losses: Callable[[], Tensor], step: Step, before: Tensor, stride: float
) -> Law:
    """One path's law, of single planned steps though it is measured with longer ones.

    n steps s, each by delta longer than the last, lead to n s + n (n - 1) / 2 delta: the turn from
    step to step begins with the second. So l_i(1) - l_i(0) = G s + 1/2 s^T (nabla^2 l) s, without
    Gamma's other part G delta; two points on the straight line along s tell them apart.
    """
    seen = [before]
    with restored(parameters) as origin:
        step()
        seen.append(losses().double())
        here = {name: p.detach().clone() for name, p in parameters.items()}
        displace(parameters, here, {name: here[name] - origin[name] for name in here})
        straight = losses().double()
        displace(parameters, here)
        for _ in range(2):
            step()
            seen.append(losses().double())
    a, b, c, d = seen
    slope = (4 * b - 3 * a - straight) / (2 * stride)
    level_set = (straight - 2 * b + a) / stride**2
    acceleration = (2 * a - 5 * b + 4 * c - d) / stride**2
    return Law(
        velocity=slope - 0.5 * (acceleration - level_set),
        acceleration=acceleration,
        jerk=(-a + 3 * b - 3 * c + d) / stride**3,
    )


def mean_law(laws: Sequence[Law]) -> Law:
    """The law of the mean path."""

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(law, name) for law in laws]).mean(0)

    return Law(mean("velocity"), mean("acceleration"), mean("jerk"))
