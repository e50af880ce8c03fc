"""Sample-space Gram: the exact eigenpairs of G^T G from the N x N matrix G G^T."""

from __future__ import annotations

import torch
from torch import Tensor

from safeopt.geometry.spectral.pairs import Eigenpairs


def gram_eigenpairs(rows: Tensor, *, floor: float = 1e-10) -> Eigenpairs:
    """Eigenpairs of G^T G / N, exact up to rounding; best for N up to about 512.

    G G^T = V Omega V^T gives the values Omega / N and the vectors G^T V Omega^(-1/2).

    Args:
        rows: G, (N, P).
        floor: eigenvalues below this share of the largest are left out: squaring G costs half of
            the digits.
    """
    g = rows.double()
    values, vectors = torch.linalg.eigh(g @ g.T)
    values, vectors = values.flip(0), vectors.flip(1)
    keep = values > floor * values[0].clamp(min=torch.finfo(values.dtype).tiny)
    values, vectors = values[keep], vectors[:, keep]
    basis = g.T @ (vectors / values.sqrt())
    return Eigenpairs((values / len(rows)).to(rows.dtype), basis.to(rows.dtype))
