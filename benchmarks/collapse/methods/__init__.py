"""The methods compared: each file builds a :class:`Method` from a :class:`Setup`.

A method knows nothing of suites. It is given a model, the anchor pool and the run's settings, and
from then on task batches.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.collapse.methods import adamw, mixed, norm_matched, random_subspace, safe
from benchmarks.collapse.methods.base import Earlier, Method, Setup

METHODS: dict[str, Callable[[Setup], Method]] = {
    "adamw": adamw.build,
    "mixed": mixed.build,
    "norm_matched": norm_matched.build,
    "random_subspace": random_subspace.build,
    "safe": safe.build,
}

__all__ = ["METHODS", "Earlier", "Method", "Setup"]
