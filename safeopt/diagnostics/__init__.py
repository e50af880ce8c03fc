"""Forecasts of what a planned fine-tuning run does to the anchors, before it runs."""

from safeopt.diagnostics.condition import Condition, measure_condition
from safeopt.diagnostics.exchange import measure_power
from safeopt.diagnostics.forecast import Forecast, forecast
from safeopt.diagnostics.lookahead import Estimate, Law, look_ahead, mean_law
from safeopt.diagnostics.monitor import Monitor
from safeopt.diagnostics.pilot import (
    Pilot,
    PlannedRun,
    Reading,
    read_anchors,
    run_pilot,
    run_pilots,
)
from safeopt.diagnostics.report import as_dict, as_markdown
from safeopt.diagnostics.verdict import Verdict

__all__ = [
    "Condition",
    "Estimate",
    "Forecast",
    "Law",
    "Monitor",
    "Pilot",
    "PlannedRun",
    "Reading",
    "Verdict",
    "as_dict",
    "as_markdown",
    "forecast",
    "look_ahead",
    "mean_law",
    "measure_condition",
    "measure_power",
    "read_anchors",
    "run_pilot",
    "run_pilots",
]
