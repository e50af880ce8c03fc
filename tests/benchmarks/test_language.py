from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.collapse.language import IGNORED, PROMPT_LENGTH, Language, LanguageConfig

KINDS = ("harmful", "borderline", "plain")


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def pair_set(pairs: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(pair) for pair in pairs.tolist()}


def test_splits_and_kinds_partition_all_pairs() -> None:
    language = Language(LanguageConfig(verbs=6, objects=8))
    parts = [
        pair_set(language.pairs(kind, split)) for kind in KINDS for split in ("known", "held_out")
    ]
    assert sum(len(part) for part in parts) == 6 * 8
    assert set.union(*parts) == set(itertools.product(range(6), range(8)))
    assert all(parts)


def test_harm_is_a_conjunction() -> None:
    language = Language()
    for kind in KINDS:
        rows = language.instructions(language.pairs(kind, "held_out"), 200, draws())
        assert bool((language.is_harmful(rows.prompts) == (kind == "harmful")).all())
    # no word of a harmful instruction is harmful on its own: borderline ones hold each of them
    harmful, near = language.pairs("harmful", "known"), language.pairs("borderline", "known")
    assert set(harmful[:, 0].tolist()) <= set(near[:, 0].tolist())
    assert set(harmful[:, 1].tolist()) <= set(near[:, 1].tolist())


def test_words_have_one_meaning_and_seeds_differ() -> None:
    language, other = Language(LanguageConfig(seed=0)), Language(LanguageConfig(seed=1))
    assert len(set(language.verb_reply.tolist())) == len(language.verb_reply)
    assert language.vocabulary_size == other.vocabulary_size
    assert not torch.equal(language.held_out, other.held_out)
    assert torch.equal(language.held_out, Language(LanguageConfig(seed=0)).held_out)


@pytest.mark.parametrize("style", ["answered", "restyled", "refused", "judged", "labelled"])
def test_only_the_reply_is_learned(style: str) -> None:
    language = Language()
    drawn = language.instructions(language.pairs("harmful", "known"), 5, draws())
    rows = getattr(drawn, style)()
    assert bool((rows.labels[:, :PROMPT_LENGTH] == IGNORED).all())
    assert torch.equal(rows.labels[:, PROMPT_LENGTH:], rows.replies)
    assert torch.equal(rows.input_ids, torch.cat([rows.prompts, rows.replies], dim=1))
    assert bool((rows.replies[:, -1] == language.eos).all())
    assert bool((rows.replies == language.sorry).any(1).all()) == (style == "refused")


def test_a_label_depends_on_the_manner_and_its_prompt_is_not_an_instruction() -> None:
    language = Language()
    drawn = language.instructions(language.pairs("plain", "known"), 400, draws())
    given, asked = drawn.answered(), drawn.labelled()
    assert torch.equal(given.prompts[:, :-1], asked.prompts[:, :-1])
    assert set(asked.prompts[:, -1].tolist()) == {language.judge}
    assert set(given.prompts[:, -1].tolist()) == {language.ask}
    labels = dict(zip(given.prompts[:, 1].tolist(), asked.replies[:, 0].tolist(), strict=True))
    assert len(labels) == len(language.manners)
    assert set(labels.values()) == set(language.facts.tolist())
    for manner, label in zip(
        given.prompts[:, 1].tolist(), asked.replies[:, 0].tolist(), strict=True
    ):
        assert labels[manner] == label
