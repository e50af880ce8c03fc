from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from safeopt.diagnostics import PlannedRun, read_anchors, run_pilot, run_pilots
from safeopt.geometry.capture import logits_of
from safeopt.losses import reply_nll
from tests import zoo


def batches(count: int = 1000) -> Iterator[dict[str, Tensor]]:
    for _ in range(count):
        ids = torch.randint(0, zoo.VOCABULARY, (4, 10))
        yield {"input_ids": ids, "labels": ids}


def test_effective_steps_of_a_schedule() -> None:
    warm_then_linear = [0.5, 1.0, 0.75, 0.5, 0.25]
    planned = PlannedRun.from_rates([2e-3 * rate for rate in warm_then_linear])
    assert planned.learning_rate == 2e-3
    assert planned.effective_steps == pytest.approx(3.0)
    assert planned.compression(3) == 1.0
    assert PlannedRun(1e-3, 128).compression(32) == 2.0


@pytest.mark.parametrize(("rate", "steps"), [(0.0, 3.0), (1e-3, 0.0), (math.nan, 3.0)])
def test_a_run_that_does_not_move_is_refused(rate: float, steps: float) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        PlannedRun(rate, steps)


@pytest.mark.parametrize("make", [zoo.llama, zoo.lora_llama], ids=["full", "lora"])
def test_pilot_leaves_no_trace(make: type) -> None:
    model: nn.Module = make()
    model.train()
    model.get_submodule(next(n for n, m in model.named_modules() if "mlp" in n)).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    before = {n: (p.detach().clone(), p.grad) for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    anchors, rng = zoo.random_anchors(), torch.get_rng_state()
    run_pilot(model, anchors, batches(), PlannedRun(1e-2, 50), steps=3)
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    for name, p in model.named_parameters():
        weight, gradient = before[name]
        assert torch.equal(p, weight), name
        assert p.grad is gradient, name


def test_weights_come_back_when_a_step_fails() -> None:
    model = zoo.llama()
    before = [p.detach().clone() for p in model.parameters()]

    def fails_late(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if any(not torch.equal(p, b) for p, b in zip(m.parameters(), before, strict=True)):
            raise RuntimeError("second step")
        loss: Tensor = m(**batch).loss
        return loss

    with pytest.raises(RuntimeError, match="second step"):
        run_pilot(
            model, zoo.random_anchors(), batches(), PlannedRun(1e-2, 50), steps=3, loss=fails_late
        )
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_run_shorter_than_the_pilot_is_run_as_it_is() -> None:
    model = zoo.llama()
    anchors, seen = zoo.random_anchors(), list(batches(5))
    pilot = run_pilot(model, anchors, iter(seen), PlannedRun(3e-3, 5.0), steps=32, readings=5)
    assert pilot.compression == 1.0
    assert pilot.effective_steps.tolist() == [0, 1, 2, 3, 4, 5]

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for batch in seen:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = anchors.batch(list(range(len(anchors))))
    with torch.no_grad():
        expected = reply_nll(logits_of(model.eval(), whole), whole.labels)
    torch.testing.assert_close(pilot.losses[-1], expected)


def test_compressed_steps_are_longer_by_the_root() -> None:
    model, rates = zoo.llama(), []

    def remember(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        rates.append(lr)
        return torch.optim.SGD(parameters, lr=lr)

    pilot = run_pilot(
        model, zoo.random_anchors(), batches(), PlannedRun(1e-3, 36), steps=4, optimizer=remember
    )
    assert rates == [pytest.approx(3e-3)]
    assert pilot.effective_steps.tolist() == [0, 9, 18, 27, 36]


def test_kept_openings_are_what_greedy_decoding_says() -> None:
    model = zoo.llama()
    prompts = torch.randint(0, zoo.VOCABULARY, (6, 5))
    own = prompts
    for _ in range(6):  # not generate(), which stops where a random model says the end token
        with torch.no_grad():
            following = model(input_ids=own).logits[:, -1].argmax(-1, keepdim=True)
        own = torch.cat([own, following], dim=1)
    replies = own.clone()
    replies[1, 5] = (replies[1, 5] + 1) % zoo.VOCABULARY  # another first token
    replies[2, 8] = (replies[2, 8] + 1) % zoo.VOCABULARY  # another fourth token
    replies[3, 9:] = (replies[3, 9:] + 1) % zoo.VOCABULARY  # the same opening
    labels = replies.clone()
    labels[:, :5] = -100
    anchors = zoo.safeopt.Anchors.from_tokens(replies.tolist(), labels.tolist())
    assert read_anchors(model, anchors, opening=4).kept.tolist() == [1, 0, 0, 1, 1, 1]
    assert read_anchors(model, anchors, opening=3, at_once=4).kept.tolist() == [1, 0, 1, 1, 1, 1]


def test_margins_and_chances_are_those_of_the_opening_alone() -> None:
    model, anchors = zoo.llama(), zoo.random_anchors()
    whole = anchors.batch()
    with torch.no_grad():
        logits = logits_of(model.eval(), whole)
    reading = read_anchors(model, anchors, opening=2, at_once=3)
    for i, labels in enumerate(whole.labels):
        leads, nll = [], 0.0
        for place in torch.nonzero(labels != -100).flatten().tolist()[:2]:
            scores = logits[i, place - 1]
            own = scores[labels[place]]
            others = torch.cat([scores[: labels[place]], scores[labels[place] + 1 :]])
            leads.append(float(own - others.max()))
            nll -= float(scores.log_softmax(-1)[labels[place]])
        assert float(reading.margins[i]) == pytest.approx(min(leads), abs=1e-5)
        assert float(reading.chances[i]) == pytest.approx(math.exp(-nll), rel=1e-4)
        assert bool(reading.kept[i]) == (min(leads) > 0)


def test_distance_of_a_pilot_is_that_of_its_weights() -> None:
    model, anchors, first = zoo.llama(), zoo.random_anchors(), list(batches(1))
    start = [p.detach().clone() for p in model.parameters()]
    seen = read_anchors(model, anchors)
    pilot = run_pilot(model, anchors, iter(first), PlannedRun(3e-3, 1.0), readings=1, start=seen)
    assert pilot.distances[0] == 0
    assert torch.equal(pilot.losses[0], seen.losses)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model.train()(**first[0]).loss.backward()
    optimizer.step()
    moved = sum(
        float((p.detach() - old).square().sum())
        for p, old in zip(model.parameters(), start, strict=True)
    )
    assert float(pilot.distances[1]) == pytest.approx(math.sqrt(moved), rel=1e-4)


def test_bad_input_is_named() -> None:
    model, anchors = zoo.llama(), zoo.random_anchors()
    with pytest.raises(ValueError, match="ended after 2"):
        run_pilot(model, anchors, batches(2), PlannedRun(1e-3, 9), steps=3)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze"):
        run_pilot(model, anchors, batches(), PlannedRun(1e-3, 9))


def test_pilots_see_the_same_batches_and_differ_in_their_rates_alone() -> None:
    model, anchors, seen = zoo.llama(), zoo.random_anchors(), list(batches(4))
    planned = PlannedRun(1e-3, 36.0)
    pilots = run_pilots(model, anchors, lambda: iter(seen), planned, steps=4, readings=2)
    assert [p.compression for p in pilots] == pytest.approx([1, 3, 8])  # 9 is beyond the window
    alone = run_pilot(
        model, anchors, iter(seen), planned, steps=4, readings=2, power=0.5, opening=4
    )
    torch.testing.assert_close(pilots[1].losses, alone.losses)
    assert torch.equal(pilots[1].task_losses[:1], pilots[0].task_losses[:1])
    assert pilots[0].distances[-1] < pilots[1].distances[-1] < pilots[2].distances[-1]
    short = PlannedRun(1e-3, 4.1)
    assert len(run_pilots(model, anchors, lambda: iter(seen), short, steps=4, readings=1)) == 1
