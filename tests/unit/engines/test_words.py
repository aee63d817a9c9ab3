"""The words that the front and a rank share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from weightbus.consumers.engines.torch.words import NOTHING_HELD, Held, RankWords


@pytest.fixture
def words() -> Iterator[RankWords]:
    words = RankWords.create(0)
    yield words
    words.close()


def test_rank_holds_nothing_and_is_held_when_created(words: RankWords) -> None:
    assert words.held() == NOTHING_HELD
    assert words.is_held()


@pytest.mark.parametrize("version", [-1, 0, 1, 7, 2**63 - 1])
@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize("updates", [0, 1, 2**61])
def test_report_comes_back_when_read_by_the_other_side(
    words: RankWords, version: int, touched: bool, updates: int
) -> None:
    other = RankWords(os.dup(words.descriptor))
    other.report(Held(version, touched, updates))
    other.close()
    assert words.held() == (version, touched, updates)
    assert words.is_held()


def test_words_are_independent_when_both_sides_write(words: RankWords) -> None:
    words.let_go()
    words.report(Held(3, True, 2))
    assert not words.is_held()
    words.hold()
    assert words.held() == (3, True, 2)
    assert words.is_held()
