"""The route `p2p`: this engine alone fetches what it needs, and disturbs no other engine.

Segments of this host are read here, those of other hosts through the transfer engine, from the
publisher and from every copy of the same checkpoint that an engine offers. The bytes go through
staging, or, where the consumer keeps a copy for others, into that copy, and from there in place.

Invariant: nothing is written to a live parameter before its bytes have been fetched and were found
to be of the promised version when they were.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import ClassVar, Final

import anyio
import anyio.to_thread
from msgspec import structs

from weightbus.bus.blocks import SharedBlock
from weightbus.bus.endpoint import Endpoint
from weightbus.bus.errors import RemoteReadFailed
from weightbus.consumers.errors import (
    DeadlineExceeded,
    RouteUnavailable,
    SegmentUnavailable,
    TornRead,
)
from weightbus.consumers.transfer.alone import bring_alone
from weightbus.consumers.transfer.copies import Copies, KeptCopy
from weightbus.consumers.transfer.fetch import Fetcher, LocalSegments, Read, open_fetcher
from weightbus.consumers.transfer.remote import open_remote_fetcher, read_generation
from weightbus.consumers.transfer.route import Route, Transfer
from weightbus.consumers.transfer.segments import probe_segment
from weightbus.consumers.transfer.staged import Clock, Staging, apply_checked
from weightbus.schemas.base import RouteName
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import (
    FileSegment,
    Placement,
    RemoteSegment,
    Segment,
    SharedMemorySegment,
)
from weightbus.schemas.worker import Applied, InPlace, StageTiming

__all__ = ("P2pRoute",)

_NEAREST_FIRST = (SharedMemorySegment, FileSegment, RemoteSegment)

FETCH_BYTES: Final = 256 * 2**20
"""Of a copy, fetched in one call: a call that makes no progress is noticed after `stall_s`."""


class P2pRoute(Route):
    """Reads from wherever the segments are, for one engine.

    Args:
        endpoint: of this process; None: this route is not available, and `missing` says why.
        local: opens what lies on this host.
        host_id, roots: as of `LocalRoute`.
        receiver: this engine's id; receivers of different ids begin at different sources.
        copies: other engines' copies; None: the publisher is asked alone.
        kept: the copy that this consumer keeps for others; None: it keeps none.
    """

    name: ClassVar[RouteName] = "p2p"

    def __init__(
        self,
        endpoint: Endpoint | None,
        staging: Staging,
        local: LocalSegments,
        host_id: str,
        roots: Sequence[str] = (),
        *,
        receiver: str = "",
        copies: Copies | None = None,
        kept: KeptCopy | None = None,
        missing: str = "there is no transfer engine",
    ) -> None:
        self._endpoint, self._missing = endpoint, missing
        self._staging, self._local = staging, local
        self._host_id, self._roots = host_id, tuple(roots)
        self._turn = zlib.crc32(receiver.encode())
        self._copies, self._kept = copies, kept

    def reach(self, layout: Layout, placement: Placement) -> Sequence[Segment]:
        if self._endpoint is None:
            raise RouteUnavailable(self.name, self._missing)
        silent: dict[str, str] = {}
        return tuple(
            self._nearest(self._endpoint, number, ways, spec.size_bytes, silent)
            for number, (ways, spec) in enumerate(zip(placement, layout.segments, strict=True))
        )

    async def transfer(self, transfer: Transfer) -> tuple[Applied, ...]:
        clock = Clock("fetch", transfer.deadline_s)
        ways = await self._reach_in_time(transfer)
        async with self._open(transfer, ways, clock.left_s()) as fetcher:
            if self._kept is not None:
                return await self._through_copy(transfer, fetcher, self._kept, clock)
            return await bring_alone(transfer, fetcher, self._staging, clock.left_s())

    async def _reach_in_time(self, transfer: Transfer) -> Sequence[Segment]:
        with anyio.move_on_after(transfer.deadline_s):
            return await anyio.to_thread.run_sync(
                self.reach, transfer.layout, transfer.placement, abandon_on_cancel=True
            )
        raise DeadlineExceeded("fetch", transfer.deadline_s)

    def _open(
        self, transfer: Transfer, ways: Sequence[Segment], deadline_s: float
    ) -> AbstractAsyncContextManager[Fetcher]:
        endpoint = self._endpoint
        assert endpoint is not None, "it has been reached"
        copies = (
            self._copies.sources(
                transfer.version,
                transfer.layout_digest,
                transfer.plan.checkpoint_ns,
                endpoint.protocol,
            )
            if self._copies is not None
            else []
        )
        open_remote = partial(open_remote_fetcher, endpoint, copies, self._turn)
        return open_fetcher(ways, transfer.layout, self._local, deadline_s, open_remote)

    async def _through_copy(
        self, transfer: Transfer, fetcher: Fetcher, kept: KeptCopy, clock: Clock
    ) -> tuple[Applied, ...]:
        start_ns = time.time_ns()
        blocks = await kept.begin(transfer.layout)
        try:
            await self._fill(blocks, fetcher, clock)
            await fetcher.check(clock.left_s())
        except BaseException:
            kept.spoil(fetcher.writing)
            raise
        sources = kept.end()
        size_bytes = sum(block.size_bytes for block in blocks)
        fetched = StageTiming("fetch", start_ns, time.time_ns(), size_bytes)
        await transfer.begin_write()
        feeds = dict.fromkeys(transfer.ranks, InPlace(sources=sources))
        first, *others = await apply_checked(transfer, feeds, clock.left_s())
        return structs.replace(first, stages=(fetched, *first.stages)), *others

    async def _fill(self, blocks: Sequence[SharedBlock], fetcher: Fetcher, clock: Clock) -> None:
        adopted: list[int] = []
        try:
            for block in blocks:
                await fetcher.adopt(block.address, block.size_bytes)
                adopted.append(block.address)
            for read in _whole(blocks):
                await fetcher.fetch([read], min(self._staging.stall_s, clock.left_s()))
        finally:
            for address in adopted:
                await fetcher.release(address)

    def _nearest(
        self,
        endpoint: Endpoint,
        number: int,
        ways: Sequence[Segment],
        size_bytes: int,
        silent: dict[str, str],
    ) -> Segment:
        """The nearest way to one segment that answers now; `silent` holds sessions that did not."""
        reasons = []
        for kind in _NEAREST_FIRST:
            for way in ways:
                if not isinstance(way, kind):
                    continue
                try:
                    if isinstance(way, RemoteSegment):
                        self._probe(endpoint, number, way, silent)
                    else:
                        probe_segment(way, size_bytes, self._host_id, self._roots)
                except (SegmentUnavailable, TornRead) as error:
                    reasons.append(str(error))
                else:
                    return way
        reason = "; ".join(reasons) or "it is offered neither to this host nor to others"
        raise RouteUnavailable(self.name, f"segment {number}: {reason}")

    def _probe(
        self, endpoint: Endpoint, number: int, way: RemoteSegment, silent: dict[str, str]
    ) -> None:
        """
        Raises:
            SegmentUnavailable, TornRead: it cannot be read now.
        """
        limit = "must be readable from here"
        if way.protocol != endpoint.protocol:
            found = f"offered by {way.protocol}, not by {endpoint.protocol}"
            raise SegmentUnavailable(f"{number} at {way.session}", found, limit)
        if way.session not in silent:
            try:
                found_generation = read_generation(endpoint, way)
            except RemoteReadFailed as error:
                silent[way.session] = error.reason
            else:
                if found_generation != way.generation:
                    name = f"{number} at {way.session}"
                    raise TornRead(name, way.generation, found_generation)
                return
        found = f"not readable ({silent[way.session]})"
        raise SegmentUnavailable(f"{number} at {way.session}", found, limit)


def _whole(blocks: Sequence[SharedBlock]) -> Iterator[Read]:
    """All bytes of all segments, in pieces."""
    for number, block in enumerate(blocks):
        for offset in range(0, block.size_bytes, FETCH_BYTES):
            count = min(FETCH_BYTES, block.size_bytes - offset)
            yield Read(number, offset, block.address + offset, count)
