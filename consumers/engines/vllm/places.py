"""Where the bytes lay that each rank took in place: it has that open still, mapped and registered,
and need not prepare for the next version there. Does no I/O.

Versions that follow each other lie in the same two slots of their publisher, in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from weightbus.consumers.transfer.segments import KEPT_MAPPINGS
from weightbus.schemas.placement import FileSegment, Segment
from weightbus.schemas.worker import Feed, InPlace

__all__ = ("OpenPlaces",)

KEPT: Final = 2

MOST_SEGMENTS: Final = KEPT_MAPPINGS // KEPT
"""Of more, a worker that reads others meanwhile may have let some go."""

Places = tuple[Segment, ...]
"""Segments, of whatever version."""


class OpenPlaces:
    """Of the ranks of one engine."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Places, ...]] = {}
        """By rank, the last first."""

    def has(self, rank: int, feed: Feed) -> bool:
        """Whether a rank has everything open that it is to read."""
        return isinstance(feed, InPlace) and _places_of(feed) in self._of.get(rank, ())

    def begin(self, feeds: Mapping[int, Feed]) -> OpenPlaces:
        """These are about to be taken: what is open is not known until `end`, which is given what
        this returns."""
        known = OpenPlaces()
        known._of = {rank: self._of.pop(rank, ()) for rank in feeds}
        return known

    def end(self, feeds: Mapping[int, Feed], before: OpenPlaces) -> None:
        """These were taken, whole. What came in another way may have had others let go."""
        for rank, feed in feeds.items():
            if isinstance(feed, InPlace) and len(feed.sources) <= MOST_SEGMENTS:
                places = _places_of(feed)
                others = (other for other in before._of[rank] if other != places)
                self._of[rank] = (places, *others)[:KEPT]

    def forget(self) -> None:
        """The workers are others."""
        self._of.clear()


def _places_of(feed: InPlace) -> Places:
    return tuple(
        source if isinstance(source, FileSegment) else msgspec.structs.replace(source, generation=0)
        for source in feed.sources
    )
