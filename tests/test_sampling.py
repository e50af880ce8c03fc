from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from safeopt.sampling import AnchorSampler


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 12), st.integers(0, 99))
def test_every_anchor_is_drawn_in_turn(refuse: int, comply: int, per_draw: int, seed: int) -> None:
    if refuse + comply == 0:
        return
    kinds = ["refuse"] * refuse + ["comply"] * comply
    sampler = AnchorSampler(kinds, per_draw, seed)
    draws = [sampler.draw() for _ in range(40)]
    sizes = {len(draw) for draw in draws}
    assert len(sizes) == 1
    assert sizes.pop() <= min(per_draw, len(kinds))
    assert all(len(set(draw)) == len(draw) for draw in draws)
    counts = Counter(i for draw in draws for i in draw)
    for pool in (range(refuse), range(refuse, refuse + comply)):
        drawn = [counts[i] for i in pool]
        if drawn and per_draw > 1:
            assert max(drawn) - min(drawn) <= 1 + max(drawn) // 10
            assert min(drawn) > 0


def test_state_continues_the_same_sequence() -> None:
    kinds = ["refuse"] * 7 + ["comply"] * 3
    first, second = AnchorSampler(kinds, 4, seed=1), AnchorSampler(kinds, 4, seed=2)
    for _ in range(5):
        first.draw()
    second.load_state_dict(first.state_dict())
    assert [first.draw() for _ in range(10)] == [second.draw() for _ in range(10)]
