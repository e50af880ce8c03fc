"""Launch of K2. The tensors must have been checked: see `safeopt_kernels.ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from safeopt_kernels import specialisations
from safeopt_kernels.lowrank import is_interpreted
from safeopt_kernels.settings import AdamW, Rounding, Seed, scalars
from safeopt_kernels.table import ALIGNMENT, Piece


def step(
    piece: Piece,
    basis: Tensor,
    adamw: AdamW,
    rounding: Rounding = "nearest",
    seed: Seed | None = None,
    *,
    backend: str = "cuda",
) -> tuple[Tensor, Tensor]:
    """K2 on one matrix: p <- p + s (I - X X^T).

    Args:
        piece: the matrix; its factors and its step are not used.
        basis: X, (cols, r), orthonormal columns.
        adamw: scalars of the step.
        rounding: how the weights are stored.
        seed: of stochastic rounding.
        backend: "cuda" or "hip".

    Returns:
        ||s||^2 and ||s X||^2, float64.
    """
    p, g, m, v = piece.p, piece.g, piece.m, piece.v
    assert g is not None
    assert m is not None
    assert v is not None
    rows, cols = piece.shape
    # A few columns of zeros let a thread load 16 bytes of the basis at a time.
    basis = torch.nn.functional.pad(basis, (0, -basis.shape[1] % ALIGNMENT)).contiguous()
    spec = specialisations.onesided(
        p.dtype,
        m.dtype,
        basis.dtype,
        rounding,
        backend=backend,
        aligned=piece.is_aligned() and basis.data_ptr() % ALIGNMENT == 0,
        exact_dot=is_interpreted(),
    )
    blocks = -(-rows // spec.constants["BM"])
    programs = min(blocks, programs_at_once(p.device))
    norms = torch.zeros(blocks, 2, dtype=torch.float32, device=p.device)
    stash = p.new_empty(programs * spec.constants["BM"], cols)
    images = stash.new_empty(len(stash), basis.shape[1], dtype=torch.float32)
    seed = seed or Seed()
    if p.numel():
        spec.kernel[(programs,)](
            p, g, m, v, basis, stash, images,
            p if piece.compensation is None else piece.compensation,
            norms, rows, cols, basis.shape[1], seed.seed, seed.step, piece.index,
            *scalars(adamw), **spec.constants, num_warps=spec.warps,
        )  # fmt: skip
    step, along = norms.sum(0, dtype=torch.float64)
    return step, along.clone()  # an operator's outputs must not share memory


def programs_at_once(device: torch.device) -> int:
    """Programs that a device runs side by side: one per multiprocessor.

    More would put more aside than the L2 cache holds: at 132 programs and 4096 columns, the
    weights and the bf16 steps of their row blocks are 34 MB.
    """
    if device.type != "cuda":
        return 2  # the interpreter: more than one, so that they share the row blocks
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
