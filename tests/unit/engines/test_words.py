"""The words that the front and a rank share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from weightbus.consumers.engines.torch.words import RankWords


@pytest.fixture
def words() -> Iterator[RankWords]:
    words = RankWords.create(0)
    yield words
    words.close()


def test_rank_holds_nothing_and_is_held_when_created(words: RankWords) -> None:
    assert words.held_version() == (-1, False)
    assert words.is_held()


@pytest.mark.parametrize("version", [-1, 0, 1, 7, 2**61])
@pytest.mark.parametrize("touched", [False, True])
def test_report_comes_back_when_read_by_the_other_side(
    words: RankWords, version: int, touched: bool
) -> None:
    other = RankWords(os.dup(words.descriptor))
    other.report(version, touched=touched)
    other.close()
    assert words.held_version() == (version, touched)
    assert words.is_held()


def test_words_are_independent_when_both_sides_write(words: RankWords) -> None:
    words.let_go()
    words.report(3, touched=True)
    assert not words.is_held()
    words.hold()
    assert words.held_version() == (3, True)
    assert words.is_held()
