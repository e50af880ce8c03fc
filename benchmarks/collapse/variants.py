"""Variants are data: differences from a suite's defaults, read from ``variants/<suite>.yaml``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "variants"
SWEEP = "sweep"
DEFAULT = "default"


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

    def made(self, result: Mapping[str, Any]) -> bool:
        """True if a result is of this variant as it is now."""
        settings = result["settings"]
        return (result["method"], result["variant"]) == (self.method, self.name) and all(
            (
                settings["options"] == self.options,
                settings["suite_options"] == self.suite,
                self.run.items() <= settings["run"].items(),
            )
        )


@dataclass(frozen=True)
class Sweep:
    """Which settings make a method's Pareto curve.

    Attributes:
        seeds: seeds of the curves; nothing was chosen while looking at them.
        task: the task metric, one of an evaluation's figures.
        strengths: per method the settings of its own beside the default.
        rates: learning rates beside the suite's, in the order in which methods take them.
        settings: how many settings every method has.
    """

    seeds: tuple[int, ...]
    task: str
    strengths: Mapping[str, Sequence[Mapping[str, Any]]]
    rates: tuple[float, ...]
    settings: int

    def variants(self, defaults: Mapping[str, Mapping[str, Any]]) -> Iterator[Variant]:
        """The rows beside each method's default: its own strengths, then learning rates."""
        for method, strengths in self.strengths.items():
            usual = dict(defaults.get(method, {}))
            for changes in strengths:
                name = _name(changes)
                yield Variant(SWEEP, method, name, name, usual | dict(changes), {}, {})
            for rate in self.rates[: self.settings - 1 - len(strengths)]:
                name = _name({"lr": rate})
                yield Variant(SWEEP, method, name, name, usual, {"lr": rate}, {})


@dataclass(frozen=True)
class SuitePlan:
    """Everything about a suite that is data: seeds, table columns, variants, sweep and tasks apart.

    A task *apart* has a table of its own and no part in the curves and the hypotheses.
    ``final_seeds`` are those that nothing was chosen on: the sweep's, where a plan names no others.
    """

    seeds: tuple[int, ...]
    columns: Mapping[str, str]
    variants: tuple[Variant, ...]
    sweep: Sweep | None = None
    apart: tuple[str, ...] = ()
    final_seeds: tuple[int, ...] = ()

    def curves(self) -> dict[str, list[Variant]]:
        """The settings on each method's Pareto curve, its default first; empty without a sweep."""
        if self.sweep is None:
            return {}
        return {
            method: [
                v
                for v in self.variants
                if v.method == method and (v.group == SWEEP or v.name == DEFAULT)
            ]
            for method in self.sweep.strengths
        }


def read_plan(suite: str, folder: Path = FOLDER) -> SuitePlan:
    """Read a suite's plan.

    Raises:
        ValueError: no plan for this suite, or two variants of one name.
    """
    plan = _load(suite, folder)
    variants = [
        _variant(group, row, plan["defaults"])
        for group, rows in plan["groups"].items()
        for row in rows
    ]
    sweep = _sweep(plan["sweep"]) if "sweep" in plan else None
    if sweep is not None:
        variants += sweep.variants(plan["defaults"])
    twice = sorted({f"{a.method}/{a.name}" for a, b in combinations(variants, 2) if _clash(a, b)})
    if twice:
        raise ValueError(f"{suite}.yaml: named twice: {', '.join(twice)}")
    final = plan.get("final_seeds", () if sweep is None else sweep.seeds)
    return SuitePlan(
        tuple(plan["seeds"]),
        plan["columns"],
        tuple(variants),
        sweep,
        apart=tuple(plan.get("apart", ())),
        final_seeds=tuple(final),
    )


def _clash(one: Variant, other: Variant) -> bool:
    """Whether two rows share a name; a curve's setting may have a row in a table as well."""
    if (one.method, one.name) != (other.method, other.name):
        return False
    shared = SWEEP in (one.group, other.group)
    return not (shared and replace(one, group=other.group, label=other.label) == other)


def _load(suite: str, folder: Path) -> dict[str, Any]:
    """A plan's rows; a plan that is ``like`` another says only what differs."""
    path = folder / f"{suite}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ValueError(f"no plan for suite {suite!r}; known: {known}")
    plan: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "like" not in plan:
        return plan
    other = _load(plan.pop("like"), folder)
    return other | plan | {"sweep": other["sweep"] | plan.get("sweep", {})}


def _sweep(rows: Mapping[str, Any]) -> Sweep:
    sweep = Sweep(
        tuple(rows["seeds"]),
        rows["task"],
        rows["strengths"],
        tuple(rows["rates"]),
        rows["settings"],
    )
    for method, strengths in sweep.strengths.items():
        most = 1 + len(strengths) + len(sweep.rates)
        if not 1 + len(strengths) <= sweep.settings <= most:
            raise ValueError(f"the sweep of {method} cannot have {sweep.settings} settings")
    return sweep


def _name(changes: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value:g}" for key, value in changes.items())


def _variant(group: str, row: Mapping[str, Any], defaults: Mapping[str, Any]) -> Variant:
    method, name = row["id"].split("/")
    options = defaults.get(method, {}) | row.get("options", {})
    run, suite = row.get("run", {}), row.get("suite", {})
    return Variant(group, method, name, row["label"], options, run, suite)
