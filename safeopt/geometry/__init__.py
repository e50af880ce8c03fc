"""Representations of the safety subspace, and the small linear algebra on them."""

from safeopt.geometry.coverage import Coverage, find_coverage
from safeopt.geometry.dense import DenseSubspace
from safeopt.geometry.gradient_sketch import GradientSketch

__all__ = ["Coverage", "DenseSubspace", "GradientSketch", "find_coverage"]
