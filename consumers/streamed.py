"""The buckets of a stage that streamed: as many as a message holds, and the few that have spans.

Does no I/O. Invariant: on the bus's clock every bucket lies within its stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from weightbus.schemas.base import BucketTiming, BucketTimings

__all__ = ("BUCKETS_SAID", "BUCKETS_TRACED", "Streamed")

BUCKETS_SAID: Final = 256
"""Of one stage, in messages: 6.4 KB, so that history holds many updates."""

BUCKETS_TRACED: Final = 32
"""Of one stage, as spans: each takes the exporting thread some 60 us, and the collector as much."""


@dataclass(frozen=True)
class Streamed:
    """One stage, and its buckets as its worker timed them."""

    buckets: BucketTimings
    """By the wall clock of the worker's host, in nanoseconds."""
    offset_ns: int
    """Bus time minus that clock."""
    start_ns: int
    """Of the stage, as its end: bus time."""
    end_ns: int

    def merged(self, most: int) -> BucketTimings:
        """`most` at most, on the bus's clock: of many, neighbours are as one."""
        many = -(-len(self.buckets) // most)
        if many <= 1:
            return self._moved(self.buckets)
        firsts = range(0, len(self.buckets), many)
        return self._moved(tuple(_one(self.buckets[first : first + many]) for first in firsts))

    def _moved(self, buckets: BucketTimings) -> BucketTimings:
        moved = []
        for bucket in buckets:
            begun_ns = min(max(bucket.start_ns + self.offset_ns, self.start_ns), self.end_ns)
            ended_ns = min(max(bucket.end_ns + self.offset_ns, begun_ns), self.end_ns)
            moved.append(BucketTiming(begun_ns, ended_ns, bucket.bytes))
        return tuple(moved)


def _one(buckets: BucketTimings) -> BucketTiming:
    return BucketTiming(
        min(bucket.start_ns for bucket in buckets),
        max(bucket.end_ns for bucket in buckets),
        sum(bucket.bytes for bucket in buckets),
    )
