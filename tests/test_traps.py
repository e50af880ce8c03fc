from __future__ import annotations

import re

from tests import traps

# Length of each numbered list in the notes.
LISTS = {"optimizers 0": 20, "optimizers 5.1": 24, "optimizers 5.4": 5}
LISTS |= {"ux 0": 15, "ux 2.2": 6, "ux 2.3": 10}


def test_every_number_is_a_trap_or_has_a_reason_not_to_be() -> None:
    every = [f"{name}.{i}" for name, count in LISTS.items() for i in range(1, count + 1)]
    listed = [*traps.TRAPS, *traps.ELSEWHERE, *traps.NOT_APPLICABLE]
    assert sorted(listed) == sorted(every)


def test_every_trap_has_a_test_and_every_marker_a_trap() -> None:
    found = traps.find()
    assert set(traps.TRAPS) - set(found) == set(), "traps that no test holds"
    assert set(found) - set(traps.TRAPS) == set(), "markers that name no trap"


def test_files_that_hold_the_rest_are_there() -> None:
    for reason in traps.ELSEWHERE.values():
        for path in re.findall(r"`([\w/.]+)`", reason):
            assert (traps.ROOT / path).exists(), path


def test_the_page_is_that_of_the_markers() -> None:
    page = traps.PAGE.read_text(encoding="utf-8")
    assert page == traps.render(traps.find()), "run: python -m tests.traps"
