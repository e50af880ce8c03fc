"""Shapes of one decoder layer of the models that the kernels are timed on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """What a layer's shapes follow from; from the model's published ``config.json``.

    Attributes:
        name: of the model.
        hidden: width of the residual stream.
        queries: width of all query heads together.
        keys: width of all key heads together; that of the values too.
        inner: width of the feed-forward layer.
        head: width of the norms on queries and keys; 0 without them.
    """

    name: str
    hidden: int
    queries: int
    keys: int
    inner: int
    head: int = 0

    def layer(self, shrink: int = 1) -> list[tuple[int, int]]:
        """The parameters of one layer as matrices; a vector has one row.

        Args:
            shrink: what every width is divided by.
        """
        hidden, queries, keys, inner, head = (
            -(-width // shrink)
            for width in (self.hidden, self.queries, self.keys, self.inner, self.head)
        )
        attention = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
        feed_forward = [(inner, hidden), (inner, hidden), (hidden, inner)]
        norms = [(1, hidden)] * 2 + [(1, head)] * (2 if head else 0)
        return attention + feed_forward + norms


MODELS = (
    Model("Llama-3.2-1B", hidden=2048, queries=2048, keys=512, inner=8192),
    Model("Qwen3-1.7B", hidden=2048, queries=2048, keys=1024, inner=6144, head=128),
    Model("Llama-3.1-8B", hidden=4096, queries=4096, keys=1024, inner=14336),
)
