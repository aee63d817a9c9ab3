"""Device lanes as their owner sees them: what they are, and whether their fillers go on. No I/O.

The slots of a device lane lie in memory of the GPU of one of the owner's own workers, its *filler*,
which fills them beside its reading. It says how far it is in words of the lane's block, and takes
from others only what the owner has staged and admitted. Who lacks nothing and does not go on is at
fault; but in a broadcast it may be any member, and only who does not answer any more is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import anyio

from weightbus.consumers.errors import WorkerLost
from weightbus.consumers.transfer.staging import StagingBlock
from weightbus.schemas.placement import Segment
from weightbus.schemas.worker import LaneFill

__all__ = ("FillerWatch", "Filling")

FETCH_STALLS: Final = 2
"""So much longer a filler may stand still in a fetch than in a broadcast: it may be in both."""


@dataclass(frozen=True, kw_only=True)
class Filling:
    """How the device lanes of one consumer are filled in one transfer."""

    slots: int
    """Of every lane, in its filler's GPU."""
    sources: tuple[Segment | None, ...]
    """For every segment of the layout: how the fillers read it; None: the consumer fetches it."""
    fills: Mapping[int, tuple[LaneFill, ...]]
    """Rank of the consumer's engine -> the lanes that it fills."""

    @property
    def brought(self) -> frozenset[int]:
        """Numbers of the segments that the consumer fetches."""
        return frozenset(n for n, source in enumerate(self.sources) if source is None)


class FillerWatch:
    """What was last seen of the worker that fills a lane.

    Args:
        rank: of the owner's engine.
        stall_s: so long it may stand still.
        begin_s: so much later it may begin: it has to plan before.
    """

    def __init__(self, block: StagingBlock, rank: int, stall_s: float, begin_s: float) -> None:
        self._block, self._rank = block, rank
        self._patience_s = {"fetch": FETCH_STALLS * stall_s, "fill": stall_s}
        self._begin_s = begin_s
        self._seen: dict[str, tuple[tuple[int, int, bool], float]] = {}
        """Of every step: what was last seen, and since when it is so."""

    def has_fetched(self, bucket: int) -> bool:
        """Whether it has room for a bucket, and its part of it if its host is the root; true of
        buckets before the first."""
        return max(0, self._block.filler_fetched()) > bucket

    def has_filled(self, bucket: int) -> bool:
        """Whether a bucket can be read."""
        return self._block.filler_filled() > bucket

    def check(self, step: Literal["fetch", "fill"], *, is_to_move: bool) -> None:
        """To be called again and again while a step is waited for.

        Args:
            is_to_move: it has been told to begin, and lacks nothing.

        Raises:
            WorkerLost: it stands still.
        """
        fetched, filled = self._block.filler_fetched(), self._block.filler_filled()
        now, seen = anyio.current_time(), (fetched, filled, is_to_move)
        known = self._seen.get(step)
        if known is None or known[0] != seen:
            self._seen[step] = seen, now
            return
        for_s = now - known[1]
        has_begun = fetched >= 0
        if is_to_move and for_s > self._patience_s[step] + (0 if has_begun else self._begin_s):
            where = "it has not begun to fill its lane"
            if has_begun:
                where = f"it stands still at bucket {filled} of the lane that it fills"
            raise WorkerLost(self._rank, f"{where} for {for_s:.1f} s")
