"""Representations of the safety subspace, and the small linear algebra on them."""

from safeopt.geometry.certificate import Certificate, certify_held_out, certify_operator
from safeopt.geometry.coverage import Coverage, find_coverage
from safeopt.geometry.dense import DenseSubspace
from safeopt.geometry.gradient_sketch import GradientSketch
from safeopt.geometry.input_subspace import InputSubspace
from safeopt.geometry.kronecker_subspace import KroneckerSubspace
from safeopt.geometry.subspace import Subspace

__all__ = [
    "Certificate",
    "Coverage",
    "DenseSubspace",
    "GradientSketch",
    "InputSubspace",
    "KroneckerSubspace",
    "Subspace",
    "certify_held_out",
    "certify_operator",
    "find_coverage",
]
