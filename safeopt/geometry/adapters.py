"""Which pieces of a base model's subspace bind the parameters that train, LoRA's among them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safeopt.geometry.subspace import GridPiece, InputPiece, Piece, Pieces, removed_by

_LORA = re.compile(r"(?P<module>.*)\.lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.weight")


@dataclass(frozen=True)
class Bound:
    """The pieces that bind a model's parameters.

    Attributes:
        pieces: projectors by the model's parameter names.
        adapters: for every ``lora_A`` bound, the name of its ``lora_B``.
        unknown: trainable parameters that the subspace says nothing about.
    """

    pieces: Pieces
    adapters: Mapping[str, str]
    unknown: tuple[str, ...]


def base_name(name: str) -> str:
    """The name that a PEFT model's parameter has in the base model."""
    name = name.removeprefix("base_model.model.")
    name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)


def bind(model: nn.Module, pieces: Pieces) -> Bound:
    """Find the pieces of each trainable parameter of ``model``.

    A LoRA adapter changes a matrix by scale B A. With A X = 0 the change vanishes on the inputs X
    whatever B is, so that ``lora_A`` takes the input side of its matrix's pieces and ``lora_B``
    trains freely.

    Args:
        model: the base model, or a PEFT model around it.
        pieces: projectors by the base model's parameter names.
    """
    bound: dict[str, tuple[Piece, ...]] = {}
    adapters: dict[str, str] = {}
    unknown = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        lora = _LORA.fullmatch(name)
        base = base_name(name if lora is None else f"{lora['module']}.weight")
        if base not in pieces:
            unknown.append(name)
        elif lora is None:
            bound[name] = pieces[base]
        elif lora["side"] == "A":
            bound[name] = tuple(_input_side(piece, base) for piece in pieces[base])
            adapters[name] = f"{lora['module']}.lora_B.{lora['adapter']}.weight"
    return Bound(bound, adapters, tuple(unknown))


def _input_side(piece: Piece, name: str) -> InputPiece:
    """The piece that keeps A X = 0 for every input direction that the matrix's piece touches."""
    if isinstance(piece, InputPiece):
        return InputPiece(piece.basis, dim=1)
    if isinstance(piece, GridPiece):
        return InputPiece(piece.inputs[:, piece.mask.any(0)], dim=1)
    raise ValueError(
        f"a LoRA adapter on {name!r} cannot be held to this subspace; adapt matrices alone "
        "(leave embeddings out of target_modules)"
    )


def clear_adapters(model: nn.Module, bound: Bound) -> None:
    """Take the anchors' inputs out of every fresh ``lora_A``; the model's function stays.

    Raises:
        ValueError: an adapter that has trained already (its ``lora_B`` is not zero) acts on the
            anchors' inputs.
    """
    parameters: dict[str, Tensor] = {n: p.detach() for n, p in model.named_parameters()}
    removed = {a: removed_by(bound.pieces[a], parameters[a]) for a in bound.adapters}
    for a, b in bound.adapters.items():
        acts = float(removed[a].norm()) > 1e-3 * float(parameters[a].norm())
        if acts and bool((parameters[b] != 0).any()):
            raise ValueError(
                f"the adapter {a!r} was trained without this passport: it changes the model on "
                "the anchors already; start from a fresh adapter, or merge it and measure a "
                "passport of the merged model"
            )
    with torch.no_grad():
        for a, part in removed.items():
            parameters[a].sub_(part)
