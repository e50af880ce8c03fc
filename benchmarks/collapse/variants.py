"""Variants are data: differences from a suite's defaults, read from ``variants/<suite>.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "variants"


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        group: the table it belongs to.
        method: name of the method.
        name: name of the variant of that method.
        label: what the table calls it.
        options: the method's options, the suite's defaults for it included.
        run: differences from the suite's run settings.
        suite: differences from the suite's configuration.
    """

    group: str
    method: str
    name: str
    label: str
    options: Mapping[str, Any]
    run: Mapping[str, Any]
    suite: Mapping[str, Any]


@dataclass(frozen=True)
class SuitePlan:
    """Everything about a suite that is data: seeds, table columns and variants."""

    seeds: tuple[int, ...]
    columns: Mapping[str, str]
    variants: tuple[Variant, ...]


def read_plan(suite: str, folder: Path = FOLDER) -> SuitePlan:
    """Read a suite's plan.

    Raises:
        ValueError: no plan for this suite, or two variants of one name.
    """
    path = folder / f"{suite}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ValueError(f"no plan for suite {suite!r}; known: {known}")
    plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    variants = tuple(
        _variant(group, row, plan["defaults"])
        for group, rows in plan["groups"].items()
        for row in rows
    )
    names = [(v.method, v.name) for v in variants]
    twice = sorted({"/".join(n) for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{path.name}: named twice: {', '.join(twice)}")
    return SuitePlan(tuple(plan["seeds"]), plan["columns"], variants)


def _variant(group: str, row: Mapping[str, Any], defaults: Mapping[str, Any]) -> Variant:
    method, name = row["id"].split("/")
    options = defaults.get(method, {}) | row.get("options", {})
    run, suite = row.get("run", {}), row.get("suite", {})
    return Variant(group, method, name, row["label"], options, run, suite)
