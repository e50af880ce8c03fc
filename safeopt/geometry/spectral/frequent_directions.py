"""Frequent Directions: the top of A^T A from a stream of rows, in memory for 2 l of them."""

from __future__ import annotations

import torch
from torch import Tensor

from safeopt.geometry.spectral.pairs import Eigenpairs


class FrequentDirections:
    """A sketch B of l rows with 0 <= x^T (A^T A - B^T B) x <= error for every unit x.

    Rows fill a buffer of 2 l; when it is full, its singular values lose the l+1st one's square:
    sigma_j^2 <- sigma_j^2 - sigma_(l+1)^2. The squares taken off add up to `error`, which is known
    exactly and never above ||A - A_k||_F^2 / (l + 1 - k) for any k <= l (Liberty 2013; Ghashami,
    Liberty, Phillips and Woodruff 2016).

    Args:
        width: P, length of a row.
        size: l, rows kept.
        dtype: of the rows.
        device: of the rows.

    Attributes:
        error: bound of the spectral error so far.
        energy: ||A||_F^2 of all rows seen.

    Example:
        >>> sketch = FrequentDirections(gradients.shape[1], size=16)
        >>> sketch.append(gradients)
        >>> pairs = sketch.eigenpairs()
    """

    def __init__(
        self,
        width: int,
        size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if size < 1 or width < 1:
            raise ValueError(f"width and size must be at least 1, got {width}, {size}")
        self.size = size
        self.error = 0.0
        self.energy = 0.0
        self._buffer = torch.zeros(2 * size, width, dtype=dtype, device=device)
        self._filled = 0

    def append(self, rows: Tensor) -> None:
        """Take in rows, (n, P) or (P,)."""
        rows = rows.reshape(-1, self._buffer.shape[1])
        self.energy += float(rows.double().square().sum())
        while len(rows):
            if self._filled == len(self._buffer):
                self._shrink()
            taken = min(len(rows), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + taken] = rows[:taken]
            self._filled += taken
            rows = rows[taken:]

    def sketch(self) -> Tensor:
        """B, (l, P): at most l rows that are not zero."""
        if self._filled > self.size:
            self._shrink()
        return self._buffer[: self.size].clone()

    def eigenpairs(self, *, floor: float = 1e-10) -> Eigenpairs:
        """Eigenpairs of B^T B, which lie below those of A^T A by at most `error`."""
        self.sketch()
        values, rows = self._decomposed()
        keep = values > floor * values[0].clamp(min=torch.finfo(values.dtype).tiny)
        unit = rows[keep] / values[keep].sqrt()[:, None]
        dtype = self._buffer.dtype
        return Eigenpairs(values[keep].to(dtype), unit.T.to(dtype))

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        """Squared singular values, largest first, and Sigma V^T of the buffer, in float64."""
        buffer = self._buffer.double()
        values, vectors = torch.linalg.eigh(buffer @ buffer.T)
        return values.flip(0).clamp(min=0), vectors.flip(1).T @ buffer

    def _shrink(self) -> None:
        values, rows = self._decomposed()
        taken = values[self.size]
        left = (values - taken).clamp(min=0)
        scale = (left / values.clamp(min=torch.finfo(values.dtype).tiny)).sqrt()
        self._buffer.copy_(scale[:, None] * rows)
        self._buffer[self.size :] = 0
        self.error += float(taken)
        self._filled = self.size
