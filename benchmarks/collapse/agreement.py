"""Whether passports of two disjoint halves of the anchors agree.

    SAFEOPT_DATA=folder python -m benchmarks.collapse.agreement --suite smol

Measurement alone, no training: principal angles between the two halves' bases, and how much of the
other half's input energy each holds, beside random bases of the same ranks.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.collapse.methods.passport import half_of, randomised
from benchmarks.collapse.results import FOLDER
from benchmarks.collapse.suite import Suite
from benchmarks.collapse.suites import make_suite
from benchmarks.collapse.variants import read_plan
from safeopt.environment import environment
from safeopt.files import write_json
from safeopt.geometry.input_subspace import InputSubspace
from safeopt.passport import Passport

QUANTILES = (0.1, 0.5, 0.9)


def principal_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of the principal angles of two orthonormal bases, largest first."""
    cosines: Tensor = torch.linalg.svdvals(first.T @ second)
    return cosines.clamp(max=1)


def compare(first: InputSubspace, second: InputSubspace) -> dict[str, dict[str, Any]]:
    """By basis: width, ranks, cosines of the principal angles."""
    return {
        name: {
            "width": len(basis),
            "ranks": [basis.shape[1], second.bases[name].shape[1]],
            "cosines": [round(c, 4) for c in principal_cosines(basis, second.bases[name]).tolist()],
        }
        for name, basis in first.bases.items()
    }


def measure(suite: Suite, task: str, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Compare the halves of a suite's anchors, and both with random bases of the same ranks.

    Args:
        suite: gives the aligned model and the anchors.
        task: the task whose anchors are taken.
        settings: keywords of `safeopt.passport.Passport.measure`.
        seed: of the random bases.
    """
    model, anchors = suite.model(), suite.anchors(task)
    draw = torch.Generator().manual_seed(seed)
    sizes = {name: len(p) for name, p in model.named_parameters()}
    halves = [half_of(anchors, half) for half in (0, 1)]
    found = [Passport.measure(model, half, **settings).inputs for half in halves]
    control = [randomised(subspace, sizes, draw) for subspace in found]
    held = {
        "own half": [(found[i], i) for i in (0, 1)],
        "other half": [(found[i], 1 - i) for i in (0, 1)],
        "random bases": [(control[i], i) for i in (0, 1)],
    }
    return {
        "anchors": [len(half) for half in halves],
        "halves": compare(*found),
        "random": compare(*control),
        "rows": [_overlap(found, name) for name in found[0].rows],
        "captured": {
            label: fmean(
                float(basis.captured(model, halves[of], range(len(halves[of]))).mean())
                for basis, of in pairs
            )
            for label, pairs in held.items()
        },
    }


def _overlap(found: Sequence[InputSubspace], name: str) -> dict[str, Any]:
    one, two = (set(subspace.rows[name].tolist()) for subspace in found)
    return {"parameter": name, "rows": [len(one), len(two)], "common": len(one & two)}


def agreement_table(result: Mapping[str, Any]) -> str:
    """Angles by kind of module, the halves' and the random control's."""
    head = ["inputs of", "width", "mean rank", "mean cos²", "angle: 10 %, 50 %, 90 %"]
    head += ["random: mean cos²", "random: angle 10 %, 50 %, 90 %"]
    rows = [head, ["---"] * len(head)]
    by_kind = itertools.groupby(sorted(result["halves"], key=_kind), _kind)
    for kind, names in ((k, list(n)) for k, n in by_kind):
        entries = [result["halves"][n] for n in names]
        rank = fmean(r for e in entries for r in e["ranks"])
        cells = [kind, str(entries[0]["width"]), f"{rank:.0f}"]
        rows.append([*cells, *_angles(result["halves"], names), *_angles(result["random"], names)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    shares = ", ".join(f"{label} {100 * s:.1f} %" for label, s in result["captured"].items())
    return "\n".join([*lines, "", f"Input energy of a half of the anchors that is held: {shares}."])


def _kind(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _angles(entries: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    cosines = torch.tensor([c for n in names for c in entries[n]["cosines"]])
    degrees = torch.rad2deg(torch.arccos(cosines))
    yield f"{float(cosines.square().mean()):.2f}"
    found = torch.quantile(degrees, torch.tensor(QUANTILES)).tolist()
    yield ", ".join(f"{value:.0f}°" for value in found)


def result_path(suite: str, folder: Path = FOLDER) -> Path:
    """``<folder>/<suite>/agreement/halves.json``."""
    return folder / suite / "agreement" / "halves.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one suite and write its result; the tables are written by ``run`` and ``tables``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="smol")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    suite = make_suite(chosen.suite, chosen.seed, {})
    plan = read_plan(chosen.suite)
    (default,) = (v for v in plan.variants if (v.method, v.name) == ("passport", "default"))
    facts = {"suite": chosen.suite, "seed": chosen.seed, "settings": dict(default.options)}
    facts |= environment()
    facts |= measure(suite, suite.tasks[0], default.options, chosen.seed)
    path = result_path(chosen.suite)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


if __name__ == "__main__":
    main()
