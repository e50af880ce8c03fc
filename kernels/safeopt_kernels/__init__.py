"""Compute primitives of safeopt: one readable reference per primitive, fast twins beside it.

The package knows nothing about safety, anchors or guards; it works on tensors. Importing it needs
torch alone: Triton is imported only by the call that uses it.
"""

from __future__ import annotations

__all__: list[str] = []
