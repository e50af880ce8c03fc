"""Representations of the safety subspace, and the small linear algebra on them."""

from safeopt.geometry.certificate import Certificate, certify_held_out, certify_operator
from safeopt.geometry.coverage import Coverage, find_coverage
from safeopt.geometry.dense import DenseSubspace
from safeopt.geometry.gradient_sketch import GradientSketch

__all__ = [
    "Certificate",
    "Coverage",
    "DenseSubspace",
    "GradientSketch",
    "certify_held_out",
    "certify_operator",
    "find_coverage",
]
