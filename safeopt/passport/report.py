"""What a passport holds, as tables in a terminal and as a picture of its spectrum."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor

from safeopt.geometry.kronecker_subspace import KroneckerSubspace
from safeopt.passport.file import Passport

if TYPE_CHECKING:
    from rich.console import Console

_BEFORE_KIND = re.compile(r".*\.\d+\.")


@dataclass(frozen=True)
class Kind:
    """Bases of one kind of module in all layers ("self_attn.q_proj").

    Attributes:
        name: the module's name behind the layer's number.
        widths: dimensions of the inputs.
        ranks: directions kept, per basis.
        energies: shares of the input energy per direction, largest first, per basis.
    """

    name: str
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    energies: tuple[Tensor, ...]

    @property
    def held(self) -> list[float]:
        """Share of the energy that each basis keeps."""
        pairs = zip(self.energies, self.ranks, strict=True)
        return [float(e[:rank].sum() / e.sum()) for e, rank in pairs]


def kinds(passport: Passport) -> list[Kind]:
    """The passport's bases by kind of module, in the model's order."""
    bases, energies = passport.inputs.bases, passport.inputs.energies
    grouped: dict[str, list[str]] = {}
    for name in sorted(bases, key=_layer_order):
        grouped.setdefault(_BEFORE_KIND.sub("", name), []).append(name)
    return [
        Kind(
            kind,
            tuple(len(bases[n]) for n in names),
            tuple(bases[n].shape[1] for n in names),
            tuple(energies[n] for n in names),
        )
        for kind, names in grouped.items()
    ]


def _layer_order(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\.(\d+)\.", name)]


def show(passport: Passport, path: Path, console: Console) -> None:
    """Print what the file says and what its bases hold."""
    from rich.table import Table

    facts = Table(title=str(path), show_header=False)
    for label, value in _facts(passport.header, passport.digest, path.stat().st_size):
        facts.add_row(label, value)
    console.print(facts)
    table = Table(title="bases")
    for heading in ("inputs of", "bases", "width", "rank", "energy held"):
        table.add_column(heading, justify="left" if heading == "inputs of" else "right")
    for kind in kinds(passport):
        table.add_row(
            kind.name,
            str(len(kind.ranks)),
            _range(kind.widths),
            _range(kind.ranks),
            f"{100 * median(kind.held):.1f} %",
        )
    console.print(table)
    subspace = passport.inputs
    rows = sum(len(ids) for ids in subspace.rows.values())
    if isinstance(passport.subspace, KroneckerSubspace):
        console.print(_grids(passport.subspace))
    console.print(
        f"held besides: {rows} rows of {len(subspace.rows)} embedding table(s), "
        f"{len(subspace.held)} norms, scales and biases whole"
    )


def _grids(subspace: KroneckerSubspace) -> str:
    held = sum(int(mask.sum()) for mask in subspace.masks.values())
    total = sum(mask.numel() for mask in subspace.masks.values())
    ranks = tuple(basis.shape[1] for basis in subspace.outputs.values())
    return (
        f"outputs of {len(ranks)} matrices: rank {_range(ranks)}, {100 * held / total:.1f} % of "
        "the coordinates of their grids are held"
    )


def _facts(header: Mapping[str, Any], digest: str, size: int) -> Iterator[tuple[str, str]]:
    anchors, certificate = header["anchors"], header["certificate"]
    settings = {k: v for k, v in header["method"].items() if k != "type"}
    yield "model", f"{header['model']['name'] or 'not named'}, {_count(header)} parameters"
    yield "tokenizer", "recorded" if header["tokenizer"] else "not recorded"
    yield "anchors", f"{anchors['refuse']} refuse, {anchors['comply']} comply"
    yield "anchors' digest", anchors["digest"]
    yield "method", header["method"]["type"]
    yield "settings", ", ".join(f"{k} = {v}" for k, v in settings.items())
    yield "certificate", _certificate(certificate)
    yield "versions", ", ".join(f"{name} {v}" for name, v in header["versions"].items() if v)
    yield "written", header["created"]
    yield "size", f"{size / 2**20:.1f} MiB"
    yield "digest", digest


def _certificate(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "none: no anchor was held out"
    return (
        f"{100 * found['captured']:.1f} % of {found['probes']} unseen anchors' energy, at least "
        f"{100 * found['lower_bound']:.1f} % at confidence {found['confidence']:g}"
    )


def _count(header: Mapping[str, Any]) -> str:
    total = 0
    for shape in header["model"]["parameters"].values():
        size = 1
        for side in shape.split()[0].split("x"):
            size *= int(side)
        total += size
    return f"{total / 1e6:.1f} M" if total >= 1e5 else str(total)


def _range(values: tuple[int, ...]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def draw(passport: Passport, path: Path) -> None:
    """Draw the spectrum: energy per direction of every basis, with the rank that was kept.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a file name that ends in no format that matplotlib writes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for number, kind in enumerate(kinds(passport)):
            _draw_kind(axes, kind, f"C{number}")
        axes.set(xscale="log", yscale="log", xlabel="direction")
        axes.set_ylim(bottom=1e-7)
        axes.set_title("share of the input energy per direction; dots: ranks kept", loc="left")
        axes.legend(title="inputs of", fontsize=8, frameon=False)
        partial = path.with_name(f".{path.name}.tmp")
        try:
            figure.savefig(partial, dpi=160, format=path.suffix.removeprefix(".") or "png")
            partial.replace(path)
        finally:
            plt.close(figure)
            partial.unlink(missing_ok=True)


def _draw_kind(axes: Any, kind: Kind, color: str) -> None:
    for i, (energies, rank) in enumerate(zip(kind.energies, kind.ranks, strict=True)):
        label = kind.name if i == 0 else None
        directions = range(1, len(energies) + 1)
        axes.plot(directions, energies, color=color, linewidth=0.7, alpha=0.6, label=label)
        axes.plot(rank, energies[rank - 1], ".", color=color, markersize=4)
