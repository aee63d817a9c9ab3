"""The route `p2p`: this engine alone fetches what it needs, and disturbs no other engine.

Segments of this host are read here, those of other hosts through the transfer engine, from the
publisher and from every copy of the same checkpoint that an engine offers. The bytes go through
staging, or, where the consumer keeps a copy for others, into that copy, and from there in place.

Invariant: nothing is written to a live parameter before its bytes have been fetched and were found
to be of the promised version when they were.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar, Final

import anyio
from msgspec import structs

from weightbus.bus.blocks import SharedBlock
from weightbus.bus.endpoint import Endpoint
from weightbus.bus.errors import BusError, BusUnavailable
from weightbus.consumers.errands import keep_on
from weightbus.consumers.errors import DeadlineExceeded, RouteUnavailable
from weightbus.consumers.transfer.alone import bring_alone
from weightbus.consumers.transfer.copies import Copies
from weightbus.consumers.transfer.fetch import Fetcher, LocalSegments, Read
from weightbus.consumers.transfer.kept import KeptCopy
from weightbus.consumers.transfer.route import Route, Transfer
from weightbus.consumers.transfer.sources import Sources
from weightbus.consumers.transfer.staged import Clock, Staging, apply_checked
from weightbus.consumers.transfer.timing import Timing
from weightbus.schemas.base import RouteName
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import Placement, Segment
from weightbus.schemas.worker import Applied, InPlace, StageTiming

__all__ = ("P2pRoute",)

_logger = logging.getLogger(__name__)

FETCH_BYTES: Final = 256 * 2**20
"""Of a copy, asked for in one call, which is spread over the sources."""


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
        self._missing = missing if endpoint is None else ""
        self._staging, self._host_id = staging, host_id
        self._sources = Sources(
            local, host_id, roots, endpoint=endpoint, receiver=receiver, copies=copies
        )
        self._kept = kept
        self._has_told = False
        """That there is no room for a copy."""

    @property
    def room_bytes(self) -> int | None:
        return self._staging.pool.room_bytes if self._kept is None else None

    def widen(
        self, ready: CheckpointReady, layout_digest: str, layout: Layout, placement: Placement
    ) -> Placement:
        return self._sources.widen(ready, layout_digest, layout, placement)

    def reach(self, layout: Layout, placement: Placement) -> Sequence[Segment]:
        if self._missing:
            raise RouteUnavailable(self.name, self._missing)
        return self._sources.reach(self.name, layout, placement)

    async def transfer(self, transfer: Transfer) -> tuple[Applied, ...]:
        clock = Clock("fetch", transfer.deadline_s)
        ways = await self.reach_in_time(transfer, "fetch", clock.left_s())
        async with self._sources.open(transfer, ways, clock.left_s()) as fetcher:
            if self._kept is not None and (blocks := await self._begin(transfer, self._kept)):
                return await self._through_copy(transfer, fetcher, self._kept, blocks, clock)
            return await bring_alone(transfer, fetcher, self._staging, clock.left_s())

    async def share(self, version: int, layout_digest: str, checkpoint_ns: int) -> bool:
        if self._kept is None:
            return False
        await keep_on(self._kept.offer(version, layout_digest, checkpoint_ns))
        return True

    async def _begin(self, transfer: Transfer, kept: KeptCopy) -> Sequence[SharedBlock]:
        """Blocks for a copy; none: it cannot be kept, and the version is brought without it."""
        try:
            return await kept.begin(transfer.layout)
        except BusUnavailable:
            raise
        except BusError as error:  # no room, or what was offered before cannot be retired
            if not self._has_told:
                _logger.warning("no copy is kept for others: %s", error)
            self._has_told = True
            return ()

    async def _through_copy(
        self,
        transfer: Transfer,
        fetcher: Fetcher,
        kept: KeptCopy,
        blocks: Sequence[SharedBlock],
        clock: Clock,
    ) -> tuple[Applied, ...]:
        timing, start_ns = Timing(), time.time_ns()
        try:
            await self._fill(blocks, fetcher, timing, clock.left_s(), adopt=not kept.is_registered)
            await fetcher.check(clock.left_s())
        except BaseException:
            kept.spoil(fetcher.writing)
            raise
        sources = kept.end(fetcher.writing)
        size_bytes = sum(block.size_bytes for block in blocks)
        fetched = StageTiming("fetch", start_ns, time.time_ns(), size_bytes, timing.buckets)
        await transfer.begin_write()
        feeds = dict.fromkeys(transfer.ranks, InPlace(sources=sources))
        first, *others = await apply_checked(transfer, feeds, clock.left_s())
        return structs.replace(first, stages=(fetched, *first.stages)), *others

    async def _fill(
        self,
        blocks: Sequence[SharedBlock],
        fetcher: Fetcher,
        timing: Timing,
        deadline_s: float,
        *,
        adopt: bool,
    ) -> None:
        adopted: list[int] = []
        try:
            with anyio.fail_after(deadline_s):
                for block in blocks if adopt else ():
                    adopted.append(block.address)
                    await fetcher.adopt(block.address, block.size_bytes)
                for read in _whole(blocks):
                    start_ns = time.time_ns()
                    await fetcher.fetch([read], self._staging.stall_s)
                    timing.add(start_ns, read.size_bytes)
        except TimeoutError as error:
            raise DeadlineExceeded("fetch", deadline_s) from error
        finally:
            for address in adopted:
                await fetcher.release(address)


def _whole(blocks: Sequence[SharedBlock]) -> Iterator[Read]:
    """All bytes of all segments, in pieces."""
    for number, block in enumerate(blocks):
        for offset in range(0, block.size_bytes, FETCH_BYTES):
            count = min(FETCH_BYTES, block.size_bytes - offset)
            yield Read(number, offset, block.address + offset, count)
