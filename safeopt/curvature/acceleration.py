"""Acceleration: how a straight or a trained path bends into the anchors' losses.

Along gradient flow theta' = s = -g the anchor loss l_i has the second derivative

    Gamma_i = s^T (nabla^2 l_i) s - G_i (H s)

with H the Hessian of the task loss. The first term is the curvature of the level set and needs
forward passes alone; the second is the task's coupling, the gamma of Springer et al. 2026 (arXiv
2602.15799), which leaves the first out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from safeopt.curvature.operators import Hessian
from safeopt.curvature.vectors import Vector, displace, restored
from safeopt.geometry.gradient_sketch import GradientSketch


@dataclass(frozen=True)
class Acceleration:
    """The two parts of Gamma_i = d^2 l_i / dt^2, each (N,) in float64.

    Attributes:
        level_set: s^T (nabla^2 l_i) s.
        coupling: -G_i (H s), which for s = -g is G_i (H g).
    """

    level_set: Tensor
    coupling: Tensor

    @property
    def total(self) -> Tensor:
        """Gamma_i, (N,)."""
        return self.level_set + self.coupling


def level_set_curvature(
    parameters: Vector,
    losses: Callable[[], Tensor],
    step: Vector,
    slopes: Tensor,
    *,
    scale: float = 1.0,
) -> Tensor:
    """s^T (nabla^2 l_i) s from two forward passes and the known slopes, (N,), float64.

    l_i(theta + h s) - l_i(theta) - h G_i s = h^2/2 s^T (nabla^2 l_i) s + O(h^3)

    The weights are restored bit for bit, also on errors.

    Args:
        parameters: the weights that move, by name.
        losses: the anchor losses at the present weights, (N,).
        step: s, one tensor per parameter; parameters that are absent do not move.
        slopes: G s, (N,), as `GradientSketch.coefficients` gives it; a compressed sketch adds its
            own error to the result.
        scale: h. A large one asks how far a path of many steps bends; a small one drowns in
            rounding, since h^2 s^T (nabla^2 l) s must stand out against 1e-7 l.
    """
    moving = {name: parameters[name] for name in step}
    before = losses().double()
    with restored(moving) as origin:
        displace(moving, origin, step, scale)
        after = losses().double()
    return 2 * (after - before - scale * slopes.to(before)) / scale**2


def coupling(sketch: GradientSketch, task_hessian: Hessian, velocity: Vector) -> Tensor:
    """-G_i (H s), (N,), float64.

    Args:
        sketch: the anchors' gradients.
        task_hessian: H, of the task loss, over the same parameters.
        velocity: s; -g for gradient flow.
    """
    return -sketch.coefficients(task_hessian.matvec(velocity))


def acceleration(
    sketch: GradientSketch,
    task_hessian: Hessian,
    velocity: Vector,
    losses: Callable[[], Tensor],
    *,
    scale: float = 1.0,
) -> Acceleration:
    """Both parts of Gamma_i along gradient flow with velocity s = -g.

    Args:
        sketch: the anchors' gradients at the present weights.
        task_hessian: H of the task loss.
        velocity: s.
        losses: the same anchors' losses at the present weights, (N,).
        scale: see `level_set_curvature`.
    """
    with torch.no_grad():
        bend = level_set_curvature(
            task_hessian.parameters, losses, velocity, sketch.coefficients(velocity), scale=scale
        )
    return Acceleration(bend, coupling(sketch, task_hessian, velocity))
