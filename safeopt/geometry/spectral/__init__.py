"""Algorithms that find a subspace from samples or from products; each with its error bound.

| what there is | algorithm | bound |
| --- | --- | --- |
| N rows, N small | `gram_eigenpairs` | exact |
| a stream of rows | `FrequentDirections` | deterministic, and measured as it goes |
| products with a positive semi-definite operator | `nystrom` | in expectation |
| products with a symmetric operator, few pairs wanted | `block_lanczos` | residuals |

A basis from any of them can be certified with `safeopt.geometry.certificate.certify_operator`.
"""

from safeopt.geometry.spectral.frequent_directions import FrequentDirections
from safeopt.geometry.spectral.gram import gram_eigenpairs
from safeopt.geometry.spectral.lanczos import block_lanczos
from safeopt.geometry.spectral.nystrom import nystrom, nystrom_bound
from safeopt.geometry.spectral.pairs import Eigenpairs, residuals

__all__ = [
    "Eigenpairs",
    "FrequentDirections",
    "block_lanczos",
    "gram_eigenpairs",
    "nystrom",
    "nystrom_bound",
    "residuals",
]
