"""Segments that the consumer fetches on demand, window by window, into a staging block of ours.

Owns the protocol of one relayed transfer: which window lies in which slot, and the one request that
may be under way. Blocking: runs in workers.

Invariants: a slot is asked to be filled again only when nothing reads it; the window that was not
used for longest goes first. What is handed out are private copies, so a window may go at any time.
"""

from __future__ import annotations

from collections import OrderedDict

from weightbus.consumers.transfer.lanes import Budget, StagingBlock, wait_for
from weightbus.consumers.transfer.opening import too_short
from weightbus.consumers.transfer.segments import OpenSegment
from weightbus.schemas.shared_memory import SHM_REQUEST_OFFSET, SHM_WANTED_OFFSET, TURN_BITS
from weightbus.schemas.worker import Relay

__all__ = ("OpenRelayed", "RelayReader")


class RelayReader:
    """Asks for windows of segments. One transfer; not for several threads."""

    def __init__(self, block: StagingBlock, feed: Relay, budget: Budget) -> None:
        self.block, self._budget = block, budget
        self._turn, self._slots, self.window_bytes = feed.turn, feed.slots, feed.window_bytes
        self._held: OrderedDict[tuple[int, int], int] = OrderedDict()
        """(segment, window) -> its slot, the longest unused first."""
        self._requests = 0

    def offset_of(self, segment: int, window: int) -> int:
        """Where in the block's data a window begins; it stays there until the next call.

        Raises:
            SegmentUnavailable: the consumer has given up, or is gone.
            DeadlineExceeded
        """
        key = (segment, window)
        slot = self._held.get(key)
        if slot is None:
            slot = len(self._held)
            if slot == self._slots:
                _, slot = self._held.popitem(last=False)
            self._request(segment, window, slot)
            self._held[key] = slot
        self._held.move_to_end(key)
        return slot * self.window_bytes

    def check(self) -> None:
        """
        Raises:
            SegmentUnavailable: the consumer has given up.
        """
        self.block.filled(self._turn)

    def _request(self, segment: int, window: int, slot: int) -> None:
        self._requests += 1
        for place, value in enumerate((segment, window, slot)):
            self.block.set_word(SHM_REQUEST_OFFSET + 8 * place, value)
        self.block.set_word(SHM_WANTED_OFFSET, self._turn << TURN_BITS | self._requests)
        wait_for(
            lambda: self.block.filled(self._turn) >= self._requests, [self.block], self._budget
        )


class OpenRelayed(OpenSegment):
    """One segment of a version that is relayed."""

    def __init__(self, relay: RelayReader, number: int, size_bytes: int) -> None:
        self.name, self.size_bytes = f"{number} through {relay.block.name}", size_bytes
        self._relay, self._number = relay, number

    def check(self) -> None:
        """Whether it was the promised version is known to the consumer, who fetched it."""
        self._relay.check()

    def read_into(self, buffer: memoryview, offset_bytes: int) -> None:
        rest = buffer.cast("B")
        end = offset_bytes + rest.nbytes
        if end > self.size_bytes:
            raise too_short(self.name, self.size_bytes, end)
        window_bytes = self._relay.window_bytes
        while rest.nbytes:
            window, within = divmod(end - rest.nbytes, window_bytes)
            count = min(window_bytes - within, rest.nbytes)
            begin = self._relay.offset_of(self._number, window) + within
            rest[:count] = self._relay.block.data[begin : begin + count]
            rest = rest[count:]
