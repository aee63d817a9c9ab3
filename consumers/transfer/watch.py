"""Whether the readers of this host's lanes go on. Does no I/O; looks at the clock.

A reader is to move when its next bucket lies in all lanes that this consumer owns. Where it owns
all lanes of the host, who does not is at fault. Otherwise a reader may wait for a lane of another
consumer, who is given the time to find out first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import anyio

from weightbus.consumers.errors import PeerLost, WorkerLost

__all__ = ("Reader", "Watch")

BEGIN_S_PER_TENSOR: Final = 5e-5
"""A worker plans its share of a layout before it reads the first bucket: 140,000 tensors took it
2.4 s."""


class Reader(NamedTuple):
    """One worker of this host; its place in the list of readers is its number."""

    name: str
    """`engine/rank`, for messages."""
    rank: int
    """Of its engine."""
    own: bool
    """Of the engine of this consumer; the others' consumers look after theirs."""


class Watch:
    """What was last seen of every reader in every lane of this consumer.

    Args:
        stall_s: so long a reader may stand still.
        shared_s: the same where it may be another consumer's fault; None: all lanes of this host
            are this consumer's.
        tensors: of the layout: workers that have much to plan may begin later.
    """

    def __init__(
        self, readers: Sequence[Reader], stall_s: float, shared_s: float | None, tensors: int
    ) -> None:
        self._readers = tuple(readers)
        self._patience_s = stall_s if shared_s is None else shared_s
        self._begin_s = BEGIN_S_PER_TENSOR * tensors
        self._told = False
        self._seen: dict[tuple[int, int], tuple[tuple[int, bool], float]] = {}
        """(Lane, reader) -> what was last seen of it there, and since when it is so."""

    @property
    def told(self) -> bool:
        """Whether this consumer's workers have been told to read."""
        return self._told

    def tell(self) -> None:
        """This consumer's workers are told to read: from now on they are to begin."""
        self._told = True

    def stall_of(
        self, block: str, lane: int, number: int, done: int, filled: int
    ) -> WorkerLost | PeerLost | None:
        """What is wrong with a reader that is waited for; None: nothing yet.

        Args:
            block: of the lane, by its name.
            done: how many of the lane's buckets it has done with; -1: it has not begun.
            filled: so many buckets lie in all lanes of this consumer.
        """
        reader = self._readers[number]
        has_begun = done >= 0
        is_to_move = filled > max(done, 0) and (has_begun or (reader.own and self._told))
        now, seen = anyio.current_time(), (done, is_to_move)
        known = self._seen.get((lane, number))
        if known is None or known[0] != seen:
            self._seen[lane, number] = seen, now
            return None
        for_s = now - known[1]
        if not is_to_move or for_s <= self._patience_s + (0 if has_begun else self._begin_s):
            return None
        where = f"it stands still at bucket {done}" if has_begun else "it has not begun to read"
        return self.lost(block, number, f"{where} for {for_s:.1f} s")

    def lost(self, block: str, number: int, reason: str) -> WorkerLost | PeerLost:
        """The error that names a reader."""
        reader = self._readers[number]
        if reader.own:
            return WorkerLost(reader.rank, reason)
        return PeerLost(block, [reader.name], reason)
