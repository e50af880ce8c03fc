"""What the kernel benchmarks count and print, against closed forms at small shapes."""

from __future__ import annotations

import pytest

from benchmarks.kernels import sketch

SHAPE = (32, 48)
M, N = SHAPE


@pytest.mark.parametrize("work", sketch.works(), ids=lambda work: work.name)
def test_no_way_to_work_on_a_sketch_beats_its_floor(work: sketch.Work) -> None:
    row = sketch.count(work, SHAPE)
    assert row["floor_bytes"] > 0
    for cost in row["ways"].values():
        assert cost["bytes"] >= row["floor_bytes"]


def test_the_bytes_of_a_gram_matrix_in_torch_have_a_closed_form() -> None:
    row = sketch.count(sketch.works()[0], SHAPE)
    rows, anchors = 16 * 8, 16
    products = 6 * rows**2  # both written, both read, their product written and read
    assert row["ways"]["eager"]["bytes"] == 4 * (rows * (M + N) + products + anchors**2)
    assert row["product_flops"] == 2 * rows**2 * (M + N)
