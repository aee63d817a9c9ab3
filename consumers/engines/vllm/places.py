"""What each rank has open, mapped and registered, of what it read in place: it need not prepare for
the next version there. Does no I/O.

Versions that follow each other lie in the same two slots of their publisher, in turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from weightbus.consumers.transfer.segments import KEPT_MAPPINGS, KEPT_OPENINGS
from weightbus.schemas.placement import FileSegment, Segment
from weightbus.schemas.worker import Feed, InPlace

__all__ = ("OpenPlaces",)

KEPT: Final = KEPT_OPENINGS - 1
"""Openings, of which the last has not closed what the first used."""

MOST_SEGMENTS: Final = KEPT_MAPPINGS // 2
"""Of more in each of two slots, a worker that reads others meanwhile may have let some go."""

Places = tuple[Segment, ...]
"""Segments, of whatever version."""


class OpenPlaces:
    """Of the ranks of one engine."""

    def __init__(self) -> None:
        self._of: dict[int, deque[Places]] = {}
        """By rank: what it opened last."""
        self._asked: set[int] = set()
        """Ranks that may be preparing something."""

    def has(self, rank: int, feed: Feed) -> bool:
        """Whether a rank has everything open that it is to read, and nothing else to end first."""
        if rank in self._asked or not isinstance(feed, InPlace):
            return False
        return _places_of(feed) in self._of.get(rank, ())

    def ask(self, ranks: Iterable[int]) -> None:
        """These are asked to prepare something."""
        self._asked |= set(ranks)

    def answer(self, feeds: Mapping[int, Feed]) -> None:
        """These have prepared what they were asked to, or tried to."""
        self.end(feeds, self.begin(feeds))

    def begin(self, feeds: Mapping[int, Feed]) -> Mapping[int, deque[Places]]:
        """These are about to be taken: what is open is not known until `end`, which is given what
        this returns."""
        return {rank: self._of.pop(rank, deque(maxlen=KEPT)) for rank in feeds}

    def end(self, feeds: Mapping[int, Feed], before: Mapping[int, deque[Places]]) -> None:
        """These were taken, whole. What comes in another way takes memory of its own, and others
        may be let go for it."""
        for rank, feed in feeds.items():
            self._asked.discard(rank)
            if isinstance(feed, InPlace) and len(feed.sources) <= MOST_SEGMENTS:
                before[rank].append(_places_of(feed))
                self._of[rank] = before[rank]

    def forget(self) -> None:
        """The workers are others."""
        self._of.clear()
        self._asked.clear()


def _places_of(feed: InPlace) -> Places:
    return tuple(
        source if isinstance(source, FileSegment) else msgspec.structs.replace(source, generation=0)
        for source in feed.sources
    )
