"""When one stage of a transfer began and ended, and when each of its buckets did. Does no I/O.

Invariants: room for all times is made at once, so that a bucket allocates nothing; buckets follow
one after the other, begin with the stage and lie within it. Times are of this host's wall clock.
"""

from __future__ import annotations

import time
from array import array
from typing import Final

from weightbus.schemas.base import BucketTiming, Stage
from weightbus.schemas.worker import StageTiming

__all__ = ("BUCKETS_KEPT", "Timing")

BUCKETS_KEPT: Final = 4096
"""Of one stage; of one that has more, none is told."""

_WORDS: Final = 3
_NO_TIMES: Final = bytes(8 * _WORDS * BUCKETS_KEPT)


class Timing:
    """Of one stage. For one thread."""

    def __init__(self) -> None:
        self.start_ns = 0
        """0: it has not begun."""
        self.end_ns = 0
        self.bytes = 0
        self._count = 0
        """How many buckets there were."""
        self._times = array("q", _NO_TIMES)
        """Start, end and bytes of every bucket that is kept."""

    def begin(self) -> None:
        """The stage begins now, if it has not begun."""
        self.start_ns = self.start_ns or time.time_ns()

    def add(self, start_ns: int, size_bytes: int) -> None:
        """A bucket that was begun at `start_ns`, after the one before it, ends now."""
        self.start_ns = self.start_ns or start_ns
        self.end_ns = time.time_ns()
        self.bytes += size_bytes
        if self._count < BUCKETS_KEPT:
            place = _WORDS * self._count
            self._times[place] = start_ns
            self._times[place + 1] = self.end_ns
            self._times[place + 2] = size_bytes
        self._count += 1

    def follow(self, size_bytes: int) -> None:
        """A bucket is seen to have ended, of which is only known that it came behind the one before
        it: it counts from the end of that, or from the beginning of the stage."""
        self.begin()
        self.add(self.end_ns or self.start_ns, size_bytes)

    def told(self, stage: Stage) -> tuple[StageTiming, ...]:
        """As one stage; none: nothing was brought."""
        if not self.bytes:
            return ()
        return (StageTiming(stage, self.start_ns, self.end_ns, self.bytes, self.buckets),)

    @property
    def buckets(self) -> tuple[BucketTiming, ...]:
        """None of a stage of one bucket, or of more than `BUCKETS_KEPT`."""
        if not 1 < self._count <= BUCKETS_KEPT:
            return ()
        times = self._times[: _WORDS * self._count]
        return tuple(map(BucketTiming, times[0::_WORDS], times[1::_WORDS], times[2::_WORDS]))
