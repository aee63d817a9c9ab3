"""Reads a version's segments from other hosts: from its publisher, and from copies of engines.

Owns no memory; knows which sources have failed. The transfer engine does the reading, in threads.

Invariants:
    A source's generation words are read when it is first contacted, and after the last byte of
    every call: what `fetch` has brought was of the promised version. What came from a copy that has
    changed meanwhile, or from a source that failed, is read again from another.
    A source that failed, changed, or said that it retires is not asked again.
    If the version's publisher has changed it, the version is torn, whatever copies there are.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count

import anyio
import anyio.to_thread
import numpy as np

from weightbus.bus.endpoint import Endpoint, RemoteRead
from weightbus.bus.errors import EndpointFailed, RemoteReadFailed
from weightbus.consumers.errors import DeadlineExceeded, SegmentUnavailable, TornRead
from weightbus.consumers.planning.reads import Batch, Reads, as_reads, plan_reads
from weightbus.consumers.transfer.fetch import Fetcher, Read
from weightbus.consumers.transfer.together import Calls, run_together
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import RemoteSegment
from weightbus.schemas.shared_memory import SHM_GENERATION_OFFSET, SHM_HEADER_BYTES

__all__ = ("RemoteFetcher", "Source", "open_remote_fetcher", "read_generation", "readers_at_once")

_logger = logging.getLogger(__name__)

MOST_READERS = 8


def readers_at_once() -> int:
    """Threads that read at a time: each keeps one core busy waiting, and another moving bytes."""
    return max(1, min((os.cpu_count() or 1) // 2, MOST_READERS))


class Source:
    """Somebody who holds some of a version's segments. Used by several threads.

    Args:
        name: for messages.
        ways: number of a segment -> where it is registered.
        own: it is the version's publisher.
        is_offered: whether it still is; asked from any thread.
    """

    def __init__(
        self,
        name: str,
        ways: Mapping[int, RemoteSegment],
        *,
        own: bool,
        is_offered: Callable[[], bool] = lambda: True,
    ) -> None:
        self.name, self.ways, self.own = name, dict(ways), own
        self._is_offered = is_offered
        self.failure = ""
        """Why it is not asked any more; empty: it is."""

    def is_usable(self) -> bool:
        if not self.failure and not self._is_offered():
            self.drop("it is about to be overwritten, or gone")
        return not self.failure

    def drop(self, reason: str) -> None:
        if not self.failure:
            self.failure = reason
            _logger.warning("%s is not read from any more: %s", self.name, reason)


class RemoteFetcher(Fetcher):
    """Segments of one version that lie in registered memory of other processes.

    Args:
        turn: this receiver's number; receivers of different numbers begin at different sources.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        sources: Sequence[Source],
        sizes_bytes: Mapping[int, int],
        turn: int = 0,
    ) -> None:
        self._endpoint, self._sources = endpoint, tuple(sources)
        self._sizes_bytes = dict(sizes_bytes)
        self._turns = count(turn)
        self._calls = Calls()
        self._readers = anyio.Semaphore(readers_at_once())

    async def contact(self, deadline_s: float) -> None:
        """Look at all sources at once; who does not answer is not waited for later.

        Raises:
            TornRead: the publisher holds another version.
            DeadlineExceeded
        """
        looks = [
            partial(self._calls.run, self._look_at, source, set(source.ways))
            for source in self._sources
        ]
        try:
            with anyio.fail_after(deadline_s):
                await run_together(looks)
        except TimeoutError as error:
            raise DeadlineExceeded("contact with the sources", deadline_s) from error

    async def fetch(self, reads: Sequence[Read], deadline_s: float) -> None:
        for read in reads:
            size_bytes = self._sizes_bytes[read.segment]
            if read.source + read.size_bytes > size_bytes:
                limit = f"must hold at least {read.source + read.size_bytes} bytes"
                raise SegmentUnavailable(f"{read.segment}", f"{size_bytes} bytes long", limit)
        left = threading.Event()
        try:
            with anyio.fail_after(deadline_s):
                wanted = as_reads(reads)
                while len(wanted):
                    wanted = await self._fetch_some(wanted, left)
        except TimeoutError as error:
            asked = ", ".join(source.name for source in self._sources if source.is_usable())
            raise DeadlineExceeded(f"fetch from {asked}", deadline_s) from error
        finally:
            left.set()

    async def check(self, deadline_s: float) -> None:
        """Every call has seen to it."""

    def writing(self) -> bool:
        return self._calls.running > 0

    async def adopt(self, address: int, size_bytes: int) -> None:
        try:
            await anyio.to_thread.run_sync(self._endpoint.register, address, size_bytes)
        except EndpointFailed as error:
            limit = "must be registered with the transfer engine"
            raise SegmentUnavailable(f"staging at {address:#x}", str(error), limit) from error

    async def release(self, address: int) -> None:
        with suppress(EndpointFailed), anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._endpoint.unregister, address)

    async def _fetch_some(self, wanted: Reads, left: threading.Event) -> Reads:
        """Read all that is wanted, by one plan; what of it has to be read again."""
        again: list[Reads] = []

        async def read_share(source: Source, batches: Sequence[Batch]) -> None:
            async with self._readers:
                again.extend(await self._calls.run(self._read_share, source, batches, left))

        shares = [
            partial(read_share, source, batches)
            for some, sources in self._candidates(wanted)
            for source, batches in self._plan(some, sources)
        ]
        await run_together(shares)
        return np.concatenate(again) if again else as_reads([])

    def _candidates(self, wanted: Reads) -> list[tuple[Reads, list[Source]]]:
        """The reads, by who has them.

        Raises:
            SegmentUnavailable: nobody has some segment.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for segment in np.unique(wanted["segment"]).tolist():
            holders = tuple(
                number
                for number, source in enumerate(self._sources)
                if segment in source.ways and source.is_usable()
            )
            if not holders:
                raise self._lost(segment)
            groups.setdefault(holders, []).append(segment)
        return [
            (wanted[np.isin(wanted["segment"], segments)], [self._sources[n] for n in holders])
            for holders, segments in groups.items()
        ]

    def _plan(
        self, reads: Reads, sources: Sequence[Source]
    ) -> list[tuple[Source, tuple[Batch, ...]]]:
        batches = plan_reads(reads, len(sources), next(self._turns))
        return [
            (source, share)
            for number, source in enumerate(sources)
            if (share := tuple(batch for batch in batches if batch.source == number))
        ]

    def _read_share(
        self, source: Source, batches: Sequence[Batch], left: threading.Event
    ) -> list[Reads]:
        """Blocking. What of the batches has to be read again.

        Raises:
            TornRead: it is the publisher, and has changed the version.
        """
        segments = {int(segment) for batch in batches for segment in batch.reads["segment"]}
        unread = len(batches)
        try:
            for number, batch in enumerate(batches):
                if left.is_set():
                    return []
                if not source.is_usable():
                    unread = number
                    break
                self._read(source, batch)
            self._check_generations(source, segments)
        except RemoteReadFailed as error:
            source.drop(str(error))
            unread = 0
        except TornRead as error:
            if source.own:
                raise
            source.drop(str(error))
            unread = 0
        return [batch.reads for batch in batches[unread:]]

    def _look_at(self, source: Source, segments: set[int]) -> None:
        """Blocking. Before the first byte is read.

        Raises:
            TornRead: it is the publisher, and has changed the version.
        """
        try:
            self._check_generations(source, segments)
        except RemoteReadFailed as error:
            source.drop(str(error))
        except TornRead as error:
            if source.own:
                raise
            source.drop(str(error))

    def _read(self, source: Source, batch: Batch) -> None:
        reads = [
            (source.ways[segment], offset, address, size_bytes)
            for segment, offset, address, size_bytes in batch.reads.tolist()
        ]
        for session in {way.session for way, *_ in reads}:  # nearly always one
            self._endpoint.read(
                session,
                [
                    RemoteRead(address, way.address + offset, size_bytes)
                    for way, offset, address, size_bytes in reads
                    if way.session == session
                ],
            )

    def _check_generations(self, source: Source, segments: set[int]) -> None:
        for segment in segments:
            way = source.ways[segment]
            found = read_generation(self._endpoint, way)
            if found != way.generation:
                raise TornRead(f"{segment} of {source.name}", way.generation, found)

    def _lost(self, segment: int) -> SegmentUnavailable:
        reasons = [
            f"{source.name}: {source.failure}" for source in self._sources if segment in source.ways
        ]
        found = f"nowhere to be read ({'; '.join(reasons) or 'nobody offers it'})"
        return SegmentUnavailable(f"{segment}", found, "must have a source that lasts")


def read_generation(endpoint: Endpoint, way: RemoteSegment) -> int:
    """The generation word of a segment's block. Blocking.

    Raises:
        RemoteReadFailed
    """
    address = way.address - SHM_HEADER_BYTES + SHM_GENERATION_OFFSET
    return endpoint.read_word(way.session, address)


@asynccontextmanager
async def open_remote_fetcher(
    endpoint: Endpoint,
    copies: Sequence[Source],
    turn: int,
    ways: Mapping[int, RemoteSegment],
    layout: Layout,
    deadline_s: float,
) -> AsyncIterator[Fetcher]:
    """As `OpenRemote`, once the first three arguments are bound.

    Args:
        copies: other holders of the same bytes.

    Raises:
        TornRead: the publisher holds another version.
        DeadlineExceeded
    """
    of_copies = {(way.session, way.address) for copy in copies for way in copy.ways.values()}
    own = {n: way for n, way in ways.items() if (way.session, way.address) not in of_copies}
    sources = [Source("the publisher", own, own=True)] if own else []
    sizes_bytes = {number: layout.segments[number].size_bytes for number in ways}
    fetcher = RemoteFetcher(endpoint, [*sources, *copies], sizes_bytes, turn)
    await fetcher.contact(deadline_s)
    yield fetcher
