"""The ways to take a step that are compared: plain AdamW, and AdamW less its low-rank part.

Every guarded provider does the same: AdamW's step s, c = G s, a = A c with a small matrix A, and
p <- p + s - sum_i a_i G_i. The kernels know no safety, so A is any matrix. K2 takes another part
out, a subspace of the inputs of every matrix: one of N q columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import counting
from safeopt_kernels import ops, reference
from safeopt_kernels.settings import AdamW

ADAMW = AdamW(lr=1e-6, weight_decay=0.01, step=10)

Step = Callable[[], None]
_List = list[Tensor]
_Tensors = tuple[_List, _List, _List, _List, _List, _List, Tensor]


@dataclass(frozen=True)
class Layer:
    """The parameters of a layer, their gradients, moments and factors.

    Attributes:
        p: weights, (rows, cols) each.
        g: gradients.
        m: first moments.
        v: second moments.
        left: factors (N, q, rows); ones for a vector, whose gradients are dense.
        right: factors (N, q, cols).
        small: A, (N, N), float64.
    """

    p: list[Tensor]
    g: list[Tensor]
    m: list[Tensor]
    v: list[Tensor]
    left: list[Tensor]
    right: list[Tensor]
    small: Tensor

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.p)

    @property
    def factor_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(t.numel() * t.element_size() for t in (*self.left, *self.right))


def make_layer(
    shapes: Sequence[tuple[int, int]],
    count: int,
    rank: int,
    weight: torch.dtype,
    device: str,
) -> Layer:
    """A layer with N = ``count`` low-rank parts of ``rank`` and fp32 moments.

    On "meta" nothing is stored; elsewhere values are drawn at random.
    """

    def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        if device == "meta":
            return torch.empty(*size, dtype=dtype, device=device)
        return torch.randn(*size, device=device).mul_(scale).to(dtype)

    ranks = [min(rank, *shape) for shape in shapes]
    return Layer(
        p=[draw(*shape, scale=0.02, dtype=weight) for shape in shapes],
        g=[draw(*shape, scale=1e-3, dtype=weight) for shape in shapes],
        m=[draw(*shape, scale=1e-3) for shape in shapes],
        v=[draw(*shape, scale=1e-3).square_() for shape in shapes],
        left=[
            torch.ones(count, 1, 1, device=device) if m == 1 else draw(count, r, m, scale=1e-2)
            for (m, _), r in zip(shapes, ranks, strict=True)
        ],
        right=[draw(count, r, n, scale=1e-2) for (_, n), r in zip(shapes, ranks, strict=True)],
        small=torch.eye(count, dtype=torch.float64, device=device),
    )


@dataclass(frozen=True)
class Provider:
    """One way to take the step.

    Attributes:
        name: in tables.
        guarded: True if the low-rank part of N gradients is taken out.
        build: makes the step of a layer, ready to be called again and again.
        bytes: what the step must move, every operation reading its inputs and writing its
            outputs; for kernels, what they move as counted in the interpreter.
    """

    name: str
    guarded: bool
    build: Callable[[Layer], Step]
    bytes: Callable[[Layer], int]


def providers() -> list[Provider]:
    """All of them; the first is what the others are compared with."""
    return [
        Provider("AdamW, fused", False, _torch_adamw("fused"), _fused_bytes),
        Provider("AdamW, foreach", False, _torch_adamw("foreach"), _foreach_bytes),
        Provider("reference, eager", True, _eager, _eager_bytes),
        Provider("reference, torch.compile", True, _compiled, _compiled_bytes),
        Provider("K1 without factors", False, _k1_alone, _k1_alone_bytes),
        Provider("K1, steps in the weights", True, _k1_in_place, _k1_in_place_bytes),
        Provider("K1, steps in a buffer", True, _k1_buffered, _k1_buffered_bytes),
        Provider("K2", False, _k2, _k2_bytes),
    ]


def _torch_adamw(implementation: str) -> Callable[[Layer], Step]:
    def build(layer: Layer) -> Step:
        parameters = [torch.nn.Parameter(p, requires_grad=False) for p in layer.p]
        for parameter, gradient in zip(parameters, layer.g, strict=True):
            parameter.grad = gradient
        options: dict[str, Any] = {implementation: True}
        optimizer = torch.optim.AdamW(parameters, lr=ADAMW.lr, weight_decay=0.01, **options)
        optimizer.step()  # makes the state
        return optimizer.step

    return build


def reference_step(layer: Layer) -> None:
    """The guarded step in plain torch, matrix by matrix."""
    steps = [
        reference.propose_(p, g, m, v, ADAMW)
        for p, g, m, v in zip(layer.p, layer.g, layer.m, layer.v, strict=True)
    ]
    seen = [
        reference.coefficients(step, left, right)
        for step, left, right in zip(steps, layer.left, layer.right, strict=True)
    ]
    weights = (layer.small @ torch.stack(seen).sum(0).double()).float()
    for p, step, left, right in zip(layer.p, steps, layer.left, layer.right, strict=True):
        reference.store(p, step - reference.low_rank(left, right, weights))


def _eager(layer: Layer) -> Step:
    return lambda: reference_step(layer)


def _compiled(layer: Layer) -> Step:
    step = torch.compile(_step_of_tensors, dynamic=False, fullgraph=True)
    return lambda: step(*_tensors(layer))


def _tensors(layer: Layer) -> _Tensors:
    return layer.p, layer.g, layer.m, layer.v, layer.left, layer.right, layer.small


def _step_of_tensors(
    p: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    left: list[Tensor],
    right: list[Tensor],
    small: Tensor,
) -> None:
    reference_step(Layer(p, g, m, v, left, right, small))


def _k1_alone(layer: Layer) -> Step:
    return lambda: _without_factors(layer.p, layer.g, layer.m, layer.v)


def _without_factors(p: _List, g: _List, m: _List, v: _List) -> None:
    left = [t.new_empty(0, 0, t.shape[0]) for t in p]
    right = [t.new_empty(0, 0, t.shape[1]) for t in p]
    ops.adamw_propose_(p, g, m, v, left, right, 0, ADAMW)


def _k1_in_place(layer: Layer) -> Step:
    return lambda: _k1(layer, [])


def _k1_buffered(layer: Layer) -> Step:
    buffers = [torch.empty_like(p) for p in layer.p]
    return lambda: _k1(layer, buffers)


def _k1(layer: Layer, steps: list[Tensor]) -> None:
    count = len(layer.small)
    c, _ = ops.adamw_propose_(
        layer.p, layer.g, layer.m, layer.v, layer.left, layer.right, count, ADAMW, steps
    )
    ops.low_rank_apply_(layer.p, layer.left, layer.right, layer.small @ c, steps)


def _k2(layer: Layer) -> Step:
    bases = [orthonormal(p.shape[1], _columns(layer, p), p.device) for p in layer.p]

    def step() -> None:
        vectors: list[tuple[Tensor, ...]] = []
        for p, g, m, v, basis in zip(layer.p, layer.g, layer.m, layer.v, bases, strict=True):
            if p.shape[0] > 1:
                ops.adamw_onesided_(p, g, m, v, basis, ADAMW)
            else:
                vectors.append((p, g, m, v))
        if vectors:
            _without_factors(*(list(tensors) for tensors in zip(*vectors, strict=True)))

    return step


def _columns(layer: Layer, p: Tensor) -> int:
    """Columns of a matrix's basis: as many directions as its N factors have."""
    ranks = (right for right in layer.right if right.shape[2] == p.shape[1])
    return min(p.shape[1], max(right.shape[0] * right.shape[1] for right in ranks))


def orthonormal(rows: int, columns: int, device: torch.device) -> Tensor:
    """A random basis (rows, columns), fp32; the same for the same sizes."""
    generator = torch.Generator().manual_seed(rows)
    basis: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q
    return basis.contiguous().to(device)


# -- bytes -------------------------------------------------------------------------------------


def _per_parameter(layer: Layer, weights: int, moments: int) -> int:
    """Bytes of a step that touches weight-like tensors ``weights`` times, moments ``moments``."""
    itemsize = layer.p[0].element_size()
    return layer.parameters * (weights * itemsize + moments * layer.m[0].element_size())


def _fused_bytes(layer: Layer) -> int:
    # torch keeps the moments in the dtype of the weights.
    return layer.parameters * 7 * layer.p[0].element_size()


def _foreach_bytes(layer: Layer) -> int:
    step = _torch_adamw("foreach")(layer)
    return counting.eager(step).bytes


def _eager_bytes(layer: Layer) -> int:
    return counting.eager(reference_step, layer).bytes


def _compiled_bytes(layer: Layer) -> int:
    empty = [
        [torch.empty(t.shape, dtype=t.dtype) for t in tensors] if isinstance(tensors, list)
        else torch.empty(tensors.shape, dtype=tensors.dtype)
        for tensors in _tensors(layer)
    ]  # fmt: skip
    return counting.compiled(_step_of_tensors, *empty).bytes


def _k1_alone_bytes(layer: Layer) -> int:
    return _per_parameter(layer, weights=3, moments=4)


def _k1_in_place_bytes(layer: Layer) -> int:
    return _per_parameter(layer, weights=5, moments=4) + 2 * layer.factor_bytes


def _k1_buffered_bytes(layer: Layer) -> int:
    return _per_parameter(layer, weights=6, moments=4) + 2 * layer.factor_bytes


def _k2_bytes(layer: Layer) -> int:
    total = 0
    for p, m in zip(layer.p, layer.m, strict=True):
        is_matrix, columns = p.shape[0] > 1, _columns(layer, p)
        total += p.numel() * ((4 if is_matrix else 3) * p.element_size() + 4 * m.element_size())
        # The basis, and y of every row.
        total += is_matrix * sum(p.shape) * columns * 4
    return total
