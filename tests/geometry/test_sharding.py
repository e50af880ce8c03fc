from __future__ import annotations

import pytest
import torch

from safeopt.distributed import Ranks, Rows
from safeopt.geometry.blocks import Block, DenseBlock, LowRankBlock, RowsBlock, cross_gram
from safeopt.geometry.sharding import keep_rows

N, TOKENS, FEATURES = 4, 6, 3


def blocks(total: int) -> dict[str, tuple[Block, torch.Size]]:
    """One block of each kind for a parameter of ``total`` rows, with the parameter's shape."""
    ids = torch.randint(0, total, (N, TOKENS))
    return {
        "low rank": (
            LowRankBlock(torch.randn(N, 2, total), torch.randn(N, 2, FEATURES)),
            torch.Size([total, FEATURES]),
        ),
        "rows": (RowsBlock(ids, torch.randn(N, TOKENS, FEATURES)), torch.Size([total, FEATURES])),
        "vector": (DenseBlock(torch.randn(N, total)), torch.Size([total])),
        "matrix": (DenseBlock(torch.randn(N, total * 2)), torch.Size([total, 2])),
    }


def shards(total: int, count: int) -> list[Rows]:
    """What ``torch.chunk`` gives each of ``count`` processes."""
    chunk = -(-total // count)
    starts = [min(total, chunk * i) for i in range(count)]
    return [Rows(start, min(total, start + chunk), total) for start in starts]


# Even, uneven, and with two empty shards.
@pytest.mark.parametrize(("total", "count"), [(8, 2), (8, 3), (5, 4), (2, 4)])
@pytest.mark.parametrize("kind", ["low rank", "rows", "vector", "matrix"])
def test_shards_add_up_to_the_whole(kind: str, total: int, count: int) -> None:
    block, shape = blocks(total)[kind]
    step, weights = torch.randn(shape), torch.randn(N)
    expected = step.clone()
    block.subtract_(expected, weights)
    coefficients, gram, parts = torch.zeros(N), torch.zeros(N, N), []
    for rows in shards(total, count):
        part, mine = keep_rows(block, rows), step[rows.start : rows.stop].clone()
        coefficients += part.coefficients(mine)
        gram += part.gram()
        part.subtract_(mine, weights)
        parts.append(mine)
    torch.testing.assert_close(coefficients, block.coefficients(step), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gram, block.gram(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-5)


def test_the_two_uses_of_a_tied_embedding_are_cut_alike() -> None:
    head, table = blocks(7)["low rank"][0], blocks(7)["rows"][0]
    parts = [cross_gram(keep_rows(head, r), keep_rows(table, r)) for r in shards(7, 3)]
    torch.testing.assert_close(sum(parts), cross_gram(head, table), rtol=1e-4, atol=1e-5)


def test_a_single_process_changes_nothing() -> None:
    ranks, block = Ranks(), blocks(5)["rows"][0]
    assert keep_rows(block, None) is block
    assert ranks.share(5).positions == (0, 1, 2, 3, 4)
    assert (ranks.size, ranks.rank) == (1, 0)
    assert ranks.sum_shards(block.rows)[0] is block.rows
    with pytest.raises(ZeroDivisionError):
        ranks.together(lambda: 1 // 0)


@pytest.mark.parametrize(("count", "size"), [(8, 3), (2, 3), (1, 4), (7, 7)])
def test_shares_cover_every_anchor_once_and_leave_no_process_idle(
    monkeypatch: pytest.MonkeyPatch, count: int, size: int
) -> None:
    monkeypatch.setattr(Ranks, "size", size)
    seen: list[int] = []
    for rank in range(size):
        monkeypatch.setattr(Ranks, "rank", rank)
        share = Ranks().share(count)
        assert share.positions
        seen += share.positions[: share.counts[rank]]
    assert seen == list(range(count))
    assert max(share.counts) - min(share.counts) <= 1
