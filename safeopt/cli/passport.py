"""``safeopt measure`` writes a passport, ``safeopt inspect passport`` shows one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from safeopt.geometry.inputs import LARGEST_RANK

if TYPE_CHECKING:
    from safeopt.passport import Passport


def add_measure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``safeopt measure``."""
    parser.add_argument("--model", required=True, help="folder or hub id of the aligned model")
    parser.add_argument(
        "--anchors", required=True, type=Path, help="JSONL rows with prompt, reply and kind"
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="file to write, M.passport.safetensors"
    )
    parser.add_argument("--adapter", type=Path, help="PEFT adapter to merge first")
    parser.add_argument("--name", help="the model's name in the passport (default: as given)")
    parser.add_argument(
        "--method",
        choices=("InputSubspace", "KroneckerSubspace"),
        default="InputSubspace",
        help="what is held of every matrix (default: InputSubspace)",
    )
    parser.add_argument(
        "--energy", type=float, default=0.95, help="share of the energy to hold (default: 0.95)"
    )
    parser.add_argument(
        "--rank",
        type=int,
        default=LARGEST_RANK,
        help=f"most directions per basis (default: {LARGEST_RANK})",
    )
    parser.add_argument(
        "--positions",
        choices=("all", "content", "reply"),
        default="all",
        help="tokens that count; content: behind the template's beginning (default: all)",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.125,
        help="share of the anchors that certify and are not fitted to (default: 0.125)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="anchors a pass (default: 8)")
    parser.add_argument("--max-length", type=int, help="longest anchor that is accepted, in tokens")
    parser.add_argument("--dtype", default="float32", help="type of the weights (default: float32)")
    parser.set_defaults(run=measure)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``safeopt inspect``."""
    kinds = parser.add_subparsers(required=True, metavar="{passport}")
    passport = kinds.add_parser("passport", help="what a passport says and holds")
    passport.add_argument("file", type=Path)
    passport.add_argument("--plot", type=Path, help="picture of the spectrum to write (PNG, SVG)")
    passport.add_argument("--json", action="store_true", help="print the header as JSON")
    passport.set_defaults(run=inspect)


def measure(arguments: argparse.Namespace) -> None:
    """Measure a passport and write it; nothing is written before all of it is measured."""
    _check(arguments)
    from safeopt.anchors import Anchors
    from safeopt.passport import Passport
    from safeopt.training.models import load_named

    model, tokenizer = load_named(arguments.model, arguments.adapter, arguments.dtype)
    anchors = Anchors.from_jsonl(arguments.anchors, tokenizer, max_length=arguments.max_length)
    passport = Passport.measure(
        model,
        anchors,
        model_name=arguments.name or _public_name(arguments.model),
        tokenizer=tokenizer,
        held_out=arguments.held_out,
        method=arguments.method,
        energy=arguments.energy,
        rank=arguments.rank,
        positions=arguments.positions,
        batch_size=arguments.batch_size,
    )
    passport.save(arguments.out)
    size = arguments.out.stat().st_size
    weights = sum(p.numel() for p in model.parameters()) * 4
    print(
        f"{arguments.out}: {size / 2**20:.1f} MiB, {100 * size / weights:.1f} % of the fp32 "
        f"weights, from {len(anchors)} anchors; `safeopt inspect passport` shows it"
    )
    _say_what_the_limit_cut(passport, arguments)


def _say_what_the_limit_cut(passport: Passport, arguments: argparse.Namespace) -> None:
    """Name the bases that hold less than ``--energy`` because of ``--rank``."""
    from safeopt.passport.report import kinds

    shares = [share for kind in kinds(passport) for share in kind.held]
    short = [share for share in shares if share < arguments.energy - 1e-4]
    if short:
        print(
            f"{len(short)} of {len(shares)} bases reached --rank {arguments.rank} and hold "
            f"{100 * min(short):.1f} % of the energy or more; a larger --rank holds more"
        )


def inspect(arguments: argparse.Namespace) -> None:
    """Print a passport, and draw its spectrum where a picture is asked for."""
    from safeopt.passport import Passport

    if arguments.plot is not None:
        _check_folder(arguments.plot, "--plot")
    passport = Passport.load(arguments.file)
    if arguments.json:
        print(json.dumps({**passport.header, "digest": passport.digest}, indent=1))
    else:
        from rich.console import Console

        from safeopt.passport.report import show

        show(passport, arguments.file, Console())
    if arguments.plot is not None:
        from safeopt.passport.report import draw

        draw(passport, arguments.plot)


def _check(arguments: argparse.Namespace) -> None:
    """Raise on what can be seen before a model is loaded."""
    _check_folder(arguments.out, "--out")
    if not arguments.out.name.endswith(".safetensors"):
        raise ValueError(
            f"--out {arguments.out}: a passport is a safetensors file; pass a name such as "
            f"{arguments.out.name or 'model'}.passport.safetensors"
        )
    if not arguments.anchors.is_file():
        raise ValueError(
            f"--anchors {arguments.anchors}: no such file; pass JSONL rows such as "
            '{"prompt": ..., "reply": ..., "kind": "refuse"}'
        )
    limits = {"rank": arguments.rank, "batch-size": arguments.batch_size}
    for option, value in limits.items():
        if value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")


def _check_folder(path: Path, option: str) -> None:
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; pass the name of a file in it")
    if not path.parent.is_dir():
        raise ValueError(
            f"{option} {path}: there is no folder {path.parent}; make it, or pass another path"
        )


def _public_name(model: str) -> str:
    """A hub id as it is; of a folder its last part alone, since the file will be published."""
    return Path(model).resolve().name if Path(model).is_dir() else model
