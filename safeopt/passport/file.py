"""Passports: a safety subspace in a file that a model's owner can publish without the anchors."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safeopt.anchors import Anchors, check_fits
from safeopt.environment import environment
from safeopt.geometry.certificate import certify_held_out
from safeopt.geometry.coverage import find_coverage, unwrapped
from safeopt.geometry.input_subspace import InputSubspace
from safeopt.geometry.kronecker_subspace import KroneckerSubspace
from safeopt.passport.fingerprints import tensors_digest, tokenizer_digests, weight_digests

SCHEMA = 1
FORMAT = "safeopt-passport"
SUBSPACES: dict[str, type[InputSubspace] | type[KroneckerSubspace]] = {
    "InputSubspace": InputSubspace,
    "KroneckerSubspace": KroneckerSubspace,
}
_ORTHONORMAL = ("basis/", "output/")  # tensors that are rounded to fp16
_VERSIONS = ("safeopt-llm", "torch", "transformers", "safetensors")


class PassportError(ValueError):
    """A file that is no whole, unchanged passport, or one of another model."""


@dataclass(frozen=True)
class Passport:
    """A subspace together with what it was measured on.

    Attributes:
        subspace: what steps must not contain.
        header: plain values: schema, model, tokenizer, anchors (their digest and number alone),
            method, certificate, versions, date and the subspace's layout.
        digest: SHA-256 over header and stored tensors.
    """

    subspace: InputSubspace | KroneckerSubspace
    header: Mapping[str, Any]
    digest: str = ""

    @property
    def inputs(self) -> InputSubspace:
        """The input side of the subspace."""
        subspace = self.subspace
        return subspace if isinstance(subspace, InputSubspace) else subspace.inputs

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        anchors: Anchors,
        *,
        model_name: str = "",
        tokenizer: Any = None,
        held_out: float = 0.125,
        method: str = "InputSubspace",
        **settings: Any,
    ) -> Passport:
        """Measure a passport with forward passes (KroneckerSubspace: and backward ones).

        Args:
            model: the aligned model, all of whose parameters require a gradient.
            anchors: examples whose behaviour must stay.
            model_name: what to call the model in the header.
            tokenizer: the tokenizer that made the anchors; its digests go into the header.
            held_out: share of the anchors that the bases are not fitted to and that certify how
                much of unseen anchors' input energy they hold; 0 uses all and certifies nothing.
            method: "InputSubspace", or the finer "KroneckerSubspace".
            settings: keywords of the method's ``measure``.

        Raises:
            ValueError: parameters that no rule covers, settings out of range, or anchors that
                do not fit the model.
        """
        model, kind = unwrapped(model), _kind(method)
        check_fits(model, anchors)
        missing = find_coverage(model).uncovered
        if missing:
            raise ValueError(f"no rule covers the parameters {list(missing)}; freeze them first")
        fitted, unseen = _split(len(anchors), held_out)
        subspace = kind.measure(model, anchors, indices=fitted, **settings)
        certificate = None
        if unseen:
            keys = ("positions", "normalise", "batch_size")
            chosen = {key: settings[key] for key in keys if key in settings}
            shares = subspace.captured(model, anchors, unseen, **chosen).double()
            certificate = certify_held_out(shares, torch.ones_like(shares)).to_dict()
        header = {
            "schema": SCHEMA,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "model": {"name": model_name, "parameters": weight_digests(model)},
            "tokenizer": None if tokenizer is None else tokenizer_digests(tokenizer),
            "anchors": {
                "digest": anchors.digest(),
                "refuse": anchors.kinds.count("refuse"),
                "comply": anchors.kinds.count("comply"),
            },
            "method": {"type": method, "held_out": len(unseen), **settings},
            "certificate": certificate,
            "versions": {n: environment()["versions"].get(n) for n in _VERSIONS},
            "layout": subspace.layout(),
        }
        return cls(subspace, header)

    def save(self, path: str | Path) -> None:
        """Write the passport, whole or not at all.

        Bases are stored in fp16 and restored to orthonormal fp32.

        Raises:
            ImportError: safetensors is not installed.
        """
        from safetensors.torch import save_file

        path = Path(path)
        tensors = {name: _stored(name, t) for name, t in self.subspace.tensors().items()}
        header = json.dumps(self.header, sort_keys=True)
        metadata = {
            "format": FORMAT,
            "header": header,
            "digest": tensors_digest(tensors, [FORMAT, header]),
        }
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            save_file(tensors, temporary, metadata)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Passport:
        """Read a passport and check that it is whole and unchanged.

        Raises:
            FileNotFoundError: there is no such file.
            ImportError: safetensors is not installed.
            PassportError: the file is cut short, of another format or schema, or was changed.
        """
        metadata, tensors = _read(Path(path))
        header = _header(Path(path), metadata)
        digest = tensors_digest(tensors, [FORMAT, metadata["header"]])
        if digest != metadata.get("digest"):
            raise PassportError(
                f"{path}: the content does not fit its digest: the file was changed or damaged "
                "after it was written; fetch it again from whoever published it"
            )
        restored = {name: _restored(name, t) for name, t in tensors.items()}
        subspace = _kind(header["method"]["type"]).from_tensors(header["layout"], restored)
        return cls(subspace, header, digest)

    def differences(self, model: nn.Module, tokenizer: Any = None) -> list[str]:
        """What differs between the passport's model or tokenizer and these, in words.

        Args:
            model: the model before training, or a PEFT model around it.
            tokenizer: a tokenizer to be compared too.
        """
        found = _differing_weights(self.header["model"]["parameters"], weight_digests(model))
        mine = self.header["tokenizer"]
        if tokenizer is not None and mine is not None:
            theirs = tokenizer_digests(tokenizer)
            found += [
                f"the tokenizer's {k.replace('_', ' ')}" for k in mine if mine[k] != theirs[k]
            ]
        return found


def _kind(method: str) -> type[InputSubspace] | type[KroneckerSubspace]:
    if method not in SUBSPACES:
        raise PassportError(f"the method must be one of {', '.join(SUBSPACES)}, got {method!r}")
    return SUBSPACES[method]


def _split(count: int, held_out: float) -> tuple[list[int], list[int]]:
    """Indices to fit to and to hold out, spread evenly over both kinds of anchors."""
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be in [0, 1), got {held_out}")
    if held_out == 0 or count < 2:
        return list(range(count)), []
    number = min(count - 1, max(1, round(held_out * count)))
    unseen = {(2 * i + 1) * count // (2 * number) for i in range(number)}
    return [i for i in range(count) if i not in unseen], sorted(unseen)


def _stored(name: str, tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.half() if name.startswith(_ORTHONORMAL) else tensor


def _restored(name: str, tensor: Tensor) -> Tensor:
    """An orthonormal basis again: one Newton-Schulz step squares the error of rounding to fp16."""
    if not name.startswith(_ORTHONORMAL):
        return tensor
    basis = tensor.float()
    return 1.5 * basis - 0.5 * basis @ (basis.T @ basis)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no passport at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PassportError(
            f"{path}: no whole safetensors file ({error}); it may have been cut short: fetch it "
            "again"
        ) from error


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT or "header" not in metadata:
        raise PassportError(
            f"{path}: a safetensors file, but no passport; `safeopt measure` makes one"
        )
    try:
        header: dict[str, Any] = json.loads(metadata["header"])
        schema = int(header["schema"])
    except (ValueError, KeyError, TypeError) as error:
        raise PassportError(f"{path}: its header cannot be read ({error})") from error
    if schema != SCHEMA:
        raise PassportError(
            f"{path}: written in schema {schema}, this version reads {SCHEMA}; "
            + ("upgrade safeopt-llm" if schema > SCHEMA else "measure it again")
        )
    return header


def _differing_weights(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    found = [f"no parameter {name!r}" for name in mine if name not in theirs]
    found += [f"a further parameter {name!r}" for name in theirs if name not in mine]
    for name in sorted(mine.keys() & theirs.keys()):
        if mine[name].split()[0] != theirs[name].split()[0]:
            found.append(
                f"shape {theirs[name].split()[0]} of {name!r}, not {mine[name].split()[0]}"
            )
    return found or [f"other weights in {n!r}" for n in mine if mine[n] != theirs[n]]
