"""Forecasts of what a planned fine-tuning run does to the anchors, before it runs."""

from safeopt.diagnostics.forecast import Forecast, Verdict, forecast
from safeopt.diagnostics.pilot import Pilot, PlannedRun, Reading, read_anchors, run_pilot
from safeopt.diagnostics.report import as_dict, as_markdown

__all__ = [
    "Forecast",
    "Pilot",
    "PlannedRun",
    "Reading",
    "Verdict",
    "as_dict",
    "as_markdown",
    "forecast",
    "read_anchors",
    "run_pilot",
]
