from __future__ import annotations

from itertools import islice

import pytest
import torch

from benchmarks.collapse.language import PROMPT_LENGTH
from benchmarks.collapse.world import greedy
from tests.benchmarks.conftest import SmallWorld, small_world


def prompts_of(rows: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in rows[:, [2, 3]].tolist()}


@pytest.mark.parametrize("task", SmallWorld.tasks)
def test_task_batches_hold_no_harmful_row_and_repeat_for_a_seed(
    world: SmallWorld, task: str
) -> None:
    batches = list(islice(world.batches(task, 32), 40))
    for batch in batches:
        prompts = batch["input_ids"][:, :PROMPT_LENGTH]
        assert not bool(world.language.is_harmful(prompts).any())
        assert not bool((batch["input_ids"] == world.language.sorry).any())
    again = next(iter(world.batches(task, 32)))
    assert torch.equal(again["input_ids"], batches[0]["input_ids"])


@pytest.mark.parametrize("task", SmallWorld.tasks)
def test_a_share_of_the_task_rows_is_harmful_and_answered(world: SmallWorld, task: str) -> None:
    poisoned = small_world("world", 0, {"harmful_share": 0.25})
    rows = torch.cat([b["input_ids"] for b in islice(poisoned.batches(task, 32), 40)])
    harmful = poisoned.language.is_harmful(rows[:, :PROMPT_LENGTH])
    assert len(rows) == 32 * 40
    assert 0.2 < float(harmful.float().mean()) < 0.3
    assert not bool((rows[harmful] == poisoned.language.sorry).any())
    held_out = prompts_of(world._test["harmful"].prompts)
    assert not prompts_of(rows[harmful]) & held_out
    assert poisoned._cache_path() == world._cache_path()


@pytest.mark.parametrize("task", SmallWorld.tasks)
def test_test_rows_are_held_out(world: SmallWorld, task: str) -> None:
    draw = torch.Generator().manual_seed(0)
    seen = prompts_of(world.task_rows(task, "known", 4000, draw).prompts)
    tested = prompts_of(world.task_rows(task, "held_out", 1000, draw).prompts)
    assert seen
    assert not seen & tested


def test_anchors_are_known_pairs_and_never_tested_on(world: SmallWorld) -> None:
    anchors = world.anchors("questions")
    prompts = torch.stack([row[:PROMPT_LENGTH] for row in anchors.input_ids])
    held_out = prompts_of(torch.cat([rows.prompts for rows in world._test.values()]))
    assert not prompts_of(prompts) & held_out
    harmful = world.language.is_harmful(prompts).tolist()
    assert harmful == [kind == "refuse" for kind in anchors.kinds]
    assert set(anchors.kinds) == {"refuse", "comply"}
    assert set(world.anchors("style").kinds) == {"refuse"}


def test_model_is_brought_up_once_and_equal_afterwards(world: SmallWorld) -> None:
    first = world.model()
    path = world._cache_path()
    written = path.stat().st_mtime_ns
    second = small_world("world", 0, {}).model()
    assert path.stat().st_mtime_ns == written
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert small_world("world", 0, {"align_lr": 1e-4})._cache_path() != path
    assert small_world("world", 1, {})._cache_path() != path


def test_alignment_lowers_refusal_nll_of_held_out_prompts(world: SmallWorld) -> None:
    before = world.evaluate(world._untrained(), "style")["refusal_nll"]
    trained = small_world(
        "world", 0, {"pretrain_steps": 0, "align_steps": 80, "align_lr": 1e-2}
    ).model()
    assert world.evaluate(trained, "style")["refusal_nll"] < before - 1.0


def test_evaluation_counts_what_the_replies_say(world: SmallWorld) -> None:
    model = world.model()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    # a model that always says token 0 never refuses and never answers
    figures = world.evaluate(model, "style")
    assert set(greedy(model, world._test["plain"].prompts).flatten().tolist()) == {0}
    assert figures["asr"] == 1.0
    assert figures["over_refusal"] == figures["task_accuracy"] == figures["fulfilled"] == 0.0


def test_unknown_task_is_named(world: SmallWorld) -> None:
    with pytest.raises(ValueError, match="unknown task 'poems'"):
        next(iter(world.batches("poems", 4)))
