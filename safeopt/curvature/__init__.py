"""Second order: curvature operators over named parameters, and the acceleration of anchors."""

from safeopt.curvature.acceleration import (
    Acceleration,
    acceleration,
    coupling,
    level_set_curvature,
)
from safeopt.curvature.derivatives import Exact, FiniteDifference
from safeopt.curvature.operators import CurvatureOperator, Fisher, GaussNewton, Hessian
from safeopt.curvature.prediction import Prediction, reply_predictions

__all__ = [
    "Acceleration",
    "CurvatureOperator",
    "Exact",
    "FiniteDifference",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "Prediction",
    "acceleration",
    "coupling",
    "level_set_curvature",
    "reply_predictions",
]
