"""The support matrix of the README, read from the tests' markers: python -m benchmarks.support.

A test carries ``@pytest.mark.supports(host="Trainer", feature="LoRA")``; parts of a marker may
stand on the parameters of a parametrized test, and are combined.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.markdown import fill
from safeopt.files import write_text

ROOT = Path(__file__).resolve().parents[1]
PART = "support"
HOSTS = (
    "plain loop",
    "Accelerate",
    "Accelerate, DDP x 2",
    "`fully_shard` x 2",
    "Trainer",
    "Trainer, DDP x 2",
    "SFTTrainer",
    "Lightning",
    "`safeopt.training` and the recipes",
    "FSDP1",
    "DeepSpeed ZeRO",
)
FEATURES = ("full", "LoRA", "DoRA", "LoRA on 4 bits", "accumulation", "resume", "figures logged")


@dataclass(frozen=True)
class Claim:
    """That a test holds one cell of the matrix.

    Attributes:
        host: row.
        feature: column.
        refused: the test holds that this is refused with a reason, not that it works.
        path: the test's file, relative to the repository.
        test: the test's name.
    """

    host: str
    feature: str
    refused: bool
    path: str
    test: str


def find_claims(root: Path = ROOT) -> list[Claim]:
    """Every claim that a marker below ``tests`` makes.

    Raises:
        ValueError: a marker lacks host or feature, is no literal, or stands on a test that is
            skipped or expected to fail.
    """
    return [
        claim for path in sorted(root.glob("tests/**/test_*.py")) for claim in _read(path, root)
    ]


def _read(path: Path, root: Path) -> Iterator[Claim]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants: dict[str, ast.expr] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = node.value
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            where = str(path.relative_to(root))
            for cell in _cells(f"{where}::{node.name}", node.decorator_list, constants):
                yield Claim(**cell, path=where, test=node.name)


def _cells(
    where: str, decorators: Sequence[ast.expr], constants: dict[str, ast.expr]
) -> list[dict[str, Any]]:
    marks = [mark for node in decorators for mark in _marks(node, constants)]
    found = [values for name, values in marks if name == "supports"]
    if not found:
        return []
    if len(found) < len(marks):
        raise ValueError(f"{where} claims support but may not run")
    hosts = [v for v in found if "feature" not in v] or [{}]
    features = [v for v in found if "host" not in v] or [{}]
    whole = [v for v in found if "host" in v and "feature" in v]
    split = [{**h, **f} for h in hosts for f in features if h or f]
    for cell in split:
        if not {"host", "feature"} <= cell.keys():
            raise ValueError(f"{where}: a supports marker needs both host and feature")
    return [{"refused": False, **cell} for cell in whole + split]


def _marks(node: ast.expr, constants: dict[str, ast.expr]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and keywords of the markers in a decorator; constants of the file are looked into."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in constants:
            yield from _marks(constants[part.id], {})
        elif isinstance(part, ast.Call) and getattr(part.func, "attr", "") == "supports":
            yield "supports", {str(k.arg): ast.literal_eval(k.value) for k in part.keywords}
        elif isinstance(part, ast.Attribute) and part.attr in ("skip", "skipif", "xfail"):
            yield part.attr, {}


def render(claims: Sequence[Claim]) -> str:
    """The matrix as a markdown table; each filled cell links to the file of its test.

    Raises:
        ValueError: a claim names a row or column that the matrix does not have.
    """
    cells: dict[tuple[str, str], Claim] = {}
    for claim in claims:
        if claim.host not in HOSTS or claim.feature not in FEATURES:
            raise ValueError(f"{claim.path}::{claim.test} names an unknown host or feature")
        cells.setdefault((claim.host, claim.feature), claim)
    lines = ["| | " + " | ".join(FEATURES) + " |", "| --- |" + " --- |" * len(FEATURES)]
    for host in HOSTS:
        row = [cells.get((host, feature)) for feature in FEATURES]
        if any(row):
            lines.append(f"| {host} | " + " | ".join(map(_cell, row)) + " |")
    return "\n".join(lines)


def _cell(claim: Claim | None) -> str:
    if claim is None:
        return ""
    return f"[{'refused' if claim.refused else 'yes'}]({claim.path})"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the matrix into README.md, or with --check tell whether it stands there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    options = parser.parse_args(argv)
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    filled = fill(text, {PART: render(find_claims())})
    if options.check:
        return int(filled != text)
    write_text(readme, filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
