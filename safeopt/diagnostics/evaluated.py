"""What forecasts and cheap predictors were worth where outcomes are known.

``evaluated.json`` is written by ``python -m benchmarks.forecast.table`` from its runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from safeopt.diagnostics.cheap import NAMES
from safeopt.diagnostics.forecast import Forecast
from safeopt.diagnostics.lookahead import Estimate
from safeopt.diagnostics.verdict import Verdict

FORECAST = "forecast"


@dataclass(frozen=True)
class Worth:
    """What a predictor was worth on a suite of runs.

    Attributes:
        rank: Spearman's correlation with the share of refusals lost, with its 95 % interval.
        holds: largest value up to which no run broke; -inf if the lowest did.
        breaks: least value from which on all runs broke; inf if the highest did not.
    """

    rank: Estimate
    holds: float
    breaks: float


@dataclass(frozen=True)
class Suite:
    """Runs of one model that were forecast and then made.

    Attributes:
        name: the model's.
        parameters: its size.
        runs: how many.
        steps: least and most effective steps of a run.
        worth: of the forecast, and of cheap predictors by the keys of `NAMES`.
    """

    name: str
    parameters: int
    runs: int
    steps: tuple[float, float]
    worth: Mapping[str, Worth]

    def better(self) -> str | None:
        """The cheap predictor that ranked outcomes best, if better than the forecast did."""
        best = max(NAMES, key=lambda key: self.worth[key].rank.value)
        return best if self.worth[best].rank.value > self.worth[FORECAST].rank.value else None


@cache
def suites() -> tuple[Suite, ...]:
    """The suites of the package's evaluation."""
    text = files("safeopt.diagnostics").joinpath("evaluated.json").read_text(encoding="utf-8")
    return tuple(_suite(found) for found in json.loads(text)["suites"])


def _suite(found: dict[str, Any]) -> Suite:
    worth = {
        key: Worth(
            Estimate(*each["rank"]),
            -math.inf if each["holds"] is None else each["holds"],
            math.inf if each["breaks"] is None else each["breaks"],
        )
        for key, each in found["worth"].items()
    }
    return Suite(**(found | {"worth": worth, "steps": tuple(found["steps"])}))


def nearest(parameters: int, among: Sequence[Suite] | None = None) -> Suite:
    """The suite whose model is nearest in size, by the ratio."""
    found = suites() if among is None else among
    return min(found, key=lambda suite: abs(math.log(max(parameters, 1) / suite.parameters)))


@dataclass(frozen=True)
class Comparison:
    """The cheap predictors of a run, beside what each was worth on the nearest suite.

    Attributes:
        values: by the keys of `NAMES`.
        suite: the nearest suite.
        effective_steps: of the run.
        forecast: the forecast's own verdict.
    """

    values: Mapping[str, float]
    suite: Suite
    effective_steps: float
    forecast: Verdict

    @property
    def used(self) -> str | None:
        """The cheap predictor that the verdict takes into account, if there is one."""
        key = self.suite.better()
        return None if key is None or math.isnan(self.values[key]) else key

    def says(self) -> str:
        """Whether "breaks", "holds" or "open": what runs of the suite with such a value did.

        A run that is longer than all of them is not known to hold, a shorter one not to break.
        """
        if self.used is None:
            return "open"
        value, worth = self.values[self.used], self.suite.worth[self.used]
        shortest, longest = self.suite.steps
        if value >= worth.breaks and self.effective_steps >= shortest:
            return "breaks"
        return "holds" if value <= worth.holds and self.effective_steps <= longest else "open"

    @property
    def verdict(self) -> Verdict:
        """The forecast's verdict with the second opinion.

        A predictor that says "breaks" takes a GO away and decides where the forecast leaves it
        open; one that says "holds" takes a NO-GO away. GO needs both.
        """
        changed = {
            "breaks": {
                Verdict.GO: Verdict.CAUTION,
                Verdict.CAUTION: Verdict.NO_GO,
                Verdict.INCONCLUSIVE: Verdict.NO_GO,
            },
            "holds": {Verdict.NO_GO: Verdict.CAUTION, Verdict.INCONCLUSIVE: Verdict.CAUTION},
        }
        return changed.get(self.says(), {}).get(self.forecast, self.forecast)

    @property
    def told(self) -> str:
        """The comparison in words."""
        own = self.suite.worth[FORECAST].rank.value
        if self.used is None:
            best = max(NAMES, key=lambda key: self.suite.worth[key].rank.value)
            return (
                f"On {self.suite.name}, the nearest model evaluated, the forecast ranked outcomes "
                f"best ({own:.2f}; {NAMES[best]} {self.suite.worth[best].rank.value:.2f}), and "
                "decides alone."
            )
        says = {
            "breaks": "All runs there with as much lost more than 10 % of their refusals",
            "holds": "No run there with as little lost more than 10 % of its refusals",
            "open": "Runs there do not tell which way such a run goes",
        }[self.says()]
        kept = self.verdict is self.forecast
        after = "the forecast stands" if kept else f"{self.forecast.value} becomes"
        return (
            f"On {self.suite.name}, the nearest model evaluated, the {NAMES[self.used]} ranked "
            f"outcomes better than the forecast ({self.suite.worth[self.used].rank.value:.2f} "
            f"against {own:.2f}), so the verdict uses it. Here it is {self.values[self.used]:.2g}. "
            f"{says}: {after}{'' if kept else ' ' + self.verdict.value}."
        )

    def weighed(self, forecast: Forecast) -> Forecast:
        """The forecast with the verdict of both, and the reason why."""
        if self.verdict is self.forecast:
            return forecast
        reason = f"{forecast.reason}. {self.told.removesuffix('.')}"
        return replace(forecast, verdict=self.verdict, reason=reason)
