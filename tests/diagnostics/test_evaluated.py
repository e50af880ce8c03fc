from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from safeopt import Anchors
from safeopt.diagnostics import Pilot, PlannedRun, Verdict, forecast
from safeopt.diagnostics.cheap import NAMES, gradients, rise_after
from safeopt.diagnostics.evaluated import FORECAST, Comparison, Suite, Worth, nearest, suites
from safeopt.diagnostics.lookahead import Estimate
from safeopt.diagnostics.report import as_dict, as_markdown


def suite(forecast: float, short_pilot: float) -> Suite:
    ranks = dict.fromkeys(NAMES, 0.0) | {FORECAST: forecast, "short_pilot": short_pilot}
    worth = {key: Worth(Estimate(rank, 0, 1), 0.1, 0.5) for key, rank in ranks.items()}
    return Suite("toy", 1000, 9, (16.0, 64.0), worth)


def comparison(
    rise: float, own: Verdict = Verdict.CAUTION, steps: float = 32.0, forecast: float = 0.8
) -> Comparison:
    values = dict.fromkeys(NAMES, 0.0) | {"short_pilot": rise}
    return Comparison(values, suite(forecast, 0.9), steps, own)


GO, CAUTION, NO_GO, OPEN = Verdict.GO, Verdict.CAUTION, Verdict.NO_GO, Verdict.INCONCLUSIVE


@pytest.mark.parametrize(
    ("rise", "verdicts"),
    [
        (0.6, {GO: CAUTION, CAUTION: NO_GO, NO_GO: NO_GO, OPEN: NO_GO}),
        (0.3, {GO: GO, CAUTION: CAUTION, NO_GO: NO_GO, OPEN: OPEN}),
        (0.05, {GO: GO, CAUTION: CAUTION, NO_GO: CAUTION, OPEN: CAUTION}),
    ],
)
def test_verdict_uses_a_cheap_predictor_that_ranked_better(
    rise: float, verdicts: dict[Verdict, Verdict]
) -> None:
    for own, both in verdicts.items():
        found = comparison(rise, own)
        assert found.verdict is both
        assert "ranked outcomes better than the forecast (0.90 against 0.80)" in found.told
        assert (f"{own.value} becomes {both.value}" in found.told) == (own is not both)
        # One that ranked worse changes nothing, and the words say who decides.
        assert comparison(rise, own, forecast=0.95).verdict is own
        assert "decides alone" in comparison(rise, own, forecast=0.95).told
        assert comparison(math.nan, own).verdict is own


def test_nothing_is_said_of_lengths_that_were_not_seen() -> None:
    assert comparison(0.05, NO_GO, steps=65.0).verdict is NO_GO
    assert comparison(0.6, CAUTION, steps=15.0).verdict is CAUTION
    assert comparison(0.6, CAUTION, steps=65.0).verdict is NO_GO


def test_nearest_model_is_that_by_ratio() -> None:
    small, large = (replace(suite(0, 0), parameters=size) for size in (100, 10_000))
    assert nearest(900, (small, large)) is small
    assert nearest(1100, (small, large)) is large
    assert nearest(7_000_000_000).name == "SmolLM2-135M"
    assert nearest(300_000).name == "the synthetic world"
    assert all(set(found.worth) == {FORECAST, *NAMES} for found in suites())


def pilot(count: int = 16) -> Pilot:
    at = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    kept = torch.ones(3, 40, dtype=torch.bool)
    return Pilot(
        planned=PlannedRun(1e-3, 16.0),
        compression=1.0,
        effective_steps=16 * at,
        losses=(1 + at[:, None] ** 2).expand(3, 40).float(),
        kept=kept,
        chances=kept.float(),
        margins=kept.float(),
        distances=at,
        task_losses=torch.linspace(2, 1, count),
    )


def test_rise_is_read_between_readings_and_of_the_runs_own_rate_alone() -> None:
    assert rise_after(pilot(), 8) == pytest.approx(0.25)
    assert rise_after(pilot(), 10) == pytest.approx(0.25 + 0.25 * 0.75)
    assert rise_after(pilot(count=8), 10) == pytest.approx(1.0)
    assert math.isnan(rise_after(replace(pilot(), compression=2.0)))


def test_report_shows_every_predictor_and_the_verdict_of_both() -> None:
    made = forecast([pilot()])
    assert made.verdict is GO
    both = comparison(0.6, made.verdict)
    weighed = both.weighed(made)
    assert weighed.verdict is CAUTION
    document = as_dict(weighed, pilot().planned, [pilot()], comparison=both)
    assert document["cheap"]["used"] == "short_pilot"
    assert "GO becomes CAUTION" in document["reason"]
    text = as_markdown(document)
    for name in NAMES.values():
        assert f"| {name} | " in text
    assert "| predictor | this run | the synthetic world | SmolLM2-135M |" in text


class Linear(nn.Module):
    """Logits that are linear in one matrix, with a loss as transformers models have."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 7))

    def forward(self, input_ids: torch.Tensor, **_: object) -> object:
        return type("Output", (), {"logits": self.table[input_ids]})()


def test_gradient_of_a_task_that_is_the_anchors_has_cosine_1() -> None:
    model = Linear()
    ids = [torch.tensor([1, 2, 3]), torch.tensor([3, 4, 5])]
    anchors = Anchors.from_tokens(ids, [torch.tensor([-100, 2, 3]), torch.tensor([-100, 4, 5])])
    batch = anchors.batch()

    def loss(sign: float) -> object:
        def of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            scores = model(batch["ids"]).logits[:, :-1].flatten(0, 1)
            return sign * nn.functional.cross_entropy(scores, batch["ids"][:, 1:].flatten())

        return of

    given = {"ids": batch.input_ids}
    norm, cosine = gradients(model, given, anchors, loss=loss(1.0), at_once=1)
    assert norm > 0
    assert cosine == pytest.approx(1, abs=1e-5)
    assert gradients(model, given, anchors, loss=loss(-2.0))[1] == pytest.approx(-1, abs=1e-5)
    assert model.table.grad is None
