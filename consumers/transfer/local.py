"""The route `local`: every rank reads the segments of its own host, in place.

Moves nothing itself: it picks the nearest way to each segment, and the engine's workers read from
there straight into their parameters. No staging, no group, no other engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import anyio
import anyio.to_thread

from weightbus.consumers.errors import (
    ApplyFailed,
    DeadlineExceeded,
    RouteUnavailable,
    SegmentUnavailable,
    TornRead,
)
from weightbus.consumers.transfer.route import Route, Transfer
from weightbus.consumers.transfer.segments import probe_segment
from weightbus.schemas.base import RouteName
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import FileSegment, Placement, Segment, SharedMemorySegment
from weightbus.schemas.worker import Applied, InPlace

__all__ = ("LocalRoute",)

_NEAREST_FIRST = (SharedMemorySegment, FileSegment)


class LocalRoute(Route):
    """Reads shared memory of this host, and files that this host can see.

    Args:
        host_id: of this host, as publishers here put it into their segments.
        roots: directories below which files may be read.
    """

    name: ClassVar[RouteName] = "local"

    def __init__(self, host_id: str, roots: Sequence[str] = ()) -> None:
        self._host_id, self._roots = host_id, tuple(roots)

    def reach(self, layout: Layout, placement: Placement) -> Sequence[Segment]:
        return tuple(
            self._nearest(number, ways, spec.size_bytes)
            for number, (ways, spec) in enumerate(zip(placement, layout.segments, strict=True))
        )

    async def transfer(self, transfer: Transfer) -> tuple[Applied, ...]:
        end = anyio.current_time() + transfer.deadline_s
        sources = await self._reach_in_time(transfer)
        await transfer.begin_write()
        left_s = end - anyio.current_time()
        if left_s <= 0:
            raise DeadlineExceeded("reload", transfer.deadline_s)
        applied = await transfer.engine.apply(
            transfer.version,
            transfer.layout_digest,
            dict.fromkeys(transfer.ranks, InPlace(sources=tuple(sources))),
            left_s,
        )
        for rank, reply in zip(transfer.ranks, applied, strict=True):
            if (reply.rank, reply.version) != (rank, transfer.version):
                reason = f"answered for rank {reply.rank} and version {reply.version}"
                raise ApplyFailed(rank, "PeerProtocolError", reason, touched=True)
        return applied

    async def _reach_in_time(self, transfer: Transfer) -> Sequence[Segment]:
        """A file server that hangs keeps a thread, but nobody who waits for it."""
        with anyio.move_on_after(transfer.deadline_s):
            return await anyio.to_thread.run_sync(
                self.reach, transfer.layout, transfer.placement, abandon_on_cancel=True
            )
        raise DeadlineExceeded("reload", transfer.deadline_s)

    def _nearest(self, number: int, ways: Sequence[Segment], size_bytes: int) -> Segment:
        """The nearest way to one segment that can be opened now."""
        reasons = []
        for kind in _NEAREST_FIRST:
            for way in ways:
                if not isinstance(way, kind):
                    continue
                try:
                    probe_segment(way, size_bytes, self._host_id, self._roots)
                except (SegmentUnavailable, TornRead) as error:
                    reasons.append(str(error))
                else:
                    return way
        reason = "; ".join(reasons) or "it is offered neither as shared memory nor as a file"
        raise RouteUnavailable(self.name, f"segment {number}: {reason}")
