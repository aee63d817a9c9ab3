"""Brings bytes of a version's segments to addresses of this process, by the nearest way to each.

Owns the segments it has open. What memory of this host holds is copied, what files hold is read,
what lies on other hosts is left to a fetcher of its own (`OpenRemote`).

Invariants: every wait has a deadline; a call that was cancelled or failed may write to its
addresses for a while yet, and `writing` says whether any does.
"""

from __future__ import annotations

import ctypes
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from typing import Final, NamedTuple

import anyio

from weightbus.consumers.errors import DeadlineExceeded, SegmentUnavailable
from weightbus.consumers.transfer.segments import OpenMemory, OpenSegment, SegmentCache, too_short
from weightbus.consumers.transfer.together import Calls, run_together
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import RemoteSegment, Segment

__all__ = (
    "Fetcher",
    "LocalFetcher",
    "LocalSegments",
    "MixedFetcher",
    "OpenRemote",
    "Read",
    "open_fetcher",
)

CHUNK_BYTES: Final = 16 * 2**20
"""Copied or read at a time: between two chunks a call looks whether anybody waits for it."""


class Read(NamedTuple):
    """One run of bytes to be fetched."""

    segment: int
    """Number of the layout's segment."""
    source: int
    """Byte of the segment where it begins."""
    address: int
    """Where it shall go, in memory of this process."""
    size_bytes: int


class Fetcher(ABC):
    """The segments of one version, open for reading. Several `fetch` calls may run at once."""

    @abstractmethod
    async def fetch(self, reads: Sequence[Read], deadline_s: float) -> None:
        """Bring all of them; returns when every byte is there.

        Raises:
            SegmentUnavailable: a segment is too short, cannot be read, or its host is lost.
            TornRead: a segment was seen to hold another version.
            DeadlineExceeded
        """

    @abstractmethod
    async def check(self, deadline_s: float) -> None:
        """Everything that was fetched so far was of the promised version.

        Raises:
            TornRead: some segment was written to.
            SegmentUnavailable: that cannot be found out any more.
            DeadlineExceeded
        """

    @abstractmethod
    def writing(self) -> bool:
        """Whether a call that was left may still write to the addresses it was given."""

    @abstractmethod
    async def adopt(self, address: int, size_bytes: int) -> None:
        """Memory that reads will go to; where it needs no preparation, nothing is done.

        Raises:
            SegmentUnavailable: it cannot be prepared.
        """

    @abstractmethod
    async def release(self, address: int) -> None:
        """Undo `adopt`. Never raises."""


OpenRemote = Callable[
    [Mapping[int, RemoteSegment], Layout, float], AbstractAsyncContextManager[Fetcher]
]
"""Opens those segments of a layout (number -> the way to it) that lie on other hosts, within so
many seconds. The fetcher is only asked for these segments."""


class LocalSegments:
    """Opens segments that this host has; keeps mappings of shared memory from version to version.

    Args:
        host_id: of this host.
        roots: directories below which files may be read.
    """

    def __init__(self, host_id: str, roots: Sequence[str] = ()) -> None:
        self._host_id, self._roots = host_id, tuple(roots)
        self._kept: list[SegmentCache] = []
        """Caches that nobody uses now."""

    @asynccontextmanager
    async def open(
        self, ways: Mapping[int, Segment], layout: Layout, deadline_s: float
    ) -> AsyncIterator[LocalFetcher]:
        """The segments of one version: number in the layout -> the way to take.

        Raises:
            SegmentUnavailable, TornRead: as `SegmentCache.open_all`.
            DeadlineExceeded: a file server does not answer.
        """
        cache = self._kept.pop() if self._kept else SegmentCache(self._host_id, self._roots)
        sizes_bytes = [layout.segments[number].size_bytes for number in ways]
        calls, stack = Calls(), ExitStack()
        opening = partial(stack.enter_context, cache.open_all(ways.values(), sizes_bytes))
        left = True
        try:
            try:
                with anyio.fail_after(deadline_s):
                    segments = await calls.run(opening)
            except TimeoutError as error:
                raise DeadlineExceeded("opening of segments", deadline_s) from error
            yield LocalFetcher(dict(zip(ways, segments, strict=True)), calls)
            left = False
        finally:
            if left or calls.running:  # a call that hangs still reads from them: closed after it
                calls.when_ended(stack.close)
                calls.when_ended(cache.close)
            else:
                stack.close()
                self._kept.append(cache)

    def close(self) -> None:
        """Unmap everything that no call uses."""
        while self._kept:
            self._kept.pop().close()


class LocalFetcher(Fetcher):
    """Shared memory and files of this host.

    Args:
        segments: number in the layout -> the segment; open until no call is running.
    """

    def __init__(self, segments: Mapping[int, OpenSegment], calls: Calls) -> None:
        self._segments, self._calls = segments, calls

    async def fetch(self, reads: Sequence[Read], deadline_s: float) -> None:
        for read in reads:
            segment = self._segments[read.segment]
            if read.source + read.size_bytes > segment.size_bytes:
                raise too_short(segment.name, segment.size_bytes, read.source + read.size_bytes)
        left = threading.Event()
        try:
            with anyio.fail_after(deadline_s):
                await self._calls.run(self._copy, reads, left)
        except TimeoutError as error:
            raise DeadlineExceeded("fetch", deadline_s) from error
        finally:
            left.set()

    async def check(self, deadline_s: float) -> None:
        try:
            with anyio.fail_after(deadline_s):
                await self._calls.run(self._check)
        except TimeoutError as error:
            raise DeadlineExceeded("fetch", deadline_s) from error

    def writing(self) -> bool:
        return self._calls.running > 0

    async def adopt(self, address: int, size_bytes: int) -> None:
        """Any memory of this process will do."""

    async def release(self, address: int) -> None:
        """Nothing was done."""

    def _copy(self, reads: Sequence[Read], left: threading.Event) -> None:
        for segment, source, address, size_bytes in reads:
            opened = self._segments[segment]
            for done in range(0, size_bytes, CHUNK_BYTES):
                if left.is_set():
                    return
                count = min(CHUNK_BYTES, size_bytes - done)
                if isinstance(opened, OpenMemory):  # memmove lets other threads run
                    ctypes.memmove(address + done, opened.address + source + done, count)
                else:
                    memory = (ctypes.c_ubyte * count).from_address(address + done)
                    opened.read_into(memoryview(memory).cast("B"), source + done)

    def _check(self) -> None:
        for segment in self._segments.values():
            segment.check()


class MixedFetcher(Fetcher):
    """Several fetchers, each for some of the segments.

    Args:
        of_segment: number in the layout -> its fetcher.
    """

    def __init__(self, of_segment: Mapping[int, Fetcher]) -> None:
        self._of_segment = of_segment
        self._fetchers = tuple(dict.fromkeys(of_segment.values()))

    async def fetch(self, reads: Sequence[Read], deadline_s: float) -> None:
        shares: dict[Fetcher, list[Read]] = {}
        for read in reads:
            shares.setdefault(self._of_segment[read.segment], []).append(read)
        await run_together(
            partial(fetcher.fetch, share, deadline_s) for fetcher, share in shares.items()
        )

    async def check(self, deadline_s: float) -> None:
        await run_together(partial(fetcher.check, deadline_s) for fetcher in self._fetchers)

    def writing(self) -> bool:
        return any(fetcher.writing() for fetcher in self._fetchers)

    async def adopt(self, address: int, size_bytes: int) -> None:
        for fetcher in self._fetchers:
            await fetcher.adopt(address, size_bytes)

    async def release(self, address: int) -> None:
        for fetcher in self._fetchers:
            await fetcher.release(address)


@asynccontextmanager
async def open_fetcher(
    ways: Sequence[Segment],
    layout: Layout,
    local: LocalSegments,
    deadline_s: float,
    open_remote: OpenRemote | None = None,
) -> AsyncIterator[Fetcher]:
    """The segments of a version, for each the way to take.

    Args:
        open_remote: for segments on other hosts; None: there must be none.

    Raises:
        SegmentUnavailable, TornRead, DeadlineExceeded: a segment cannot be opened.
    """
    end = anyio.current_time() + deadline_s
    remote = {n: way for n, way in enumerate(ways) if isinstance(way, RemoteSegment)}
    near = {n: way for n, way in enumerate(ways) if n not in remote}
    async with AsyncExitStack() as stack:
        of_segment: dict[int, Fetcher] = {}
        if near:
            fetcher: Fetcher = await stack.enter_async_context(local.open(near, layout, deadline_s))
            of_segment |= dict.fromkeys(near, fetcher)
        if remote:
            if open_remote is None:
                raise SegmentUnavailable(f"{min(remote)}", "on another host", "must be on this one")
            left_s = end - anyio.current_time()
            fetcher = await stack.enter_async_context(open_remote(remote, layout, left_s))
            of_segment |= dict.fromkeys(remote, fetcher)
        yield MixedFetcher(of_segment)
