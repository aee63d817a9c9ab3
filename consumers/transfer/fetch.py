"""Brings bytes of a version's segments to addresses of this process, by the nearest way to each.

Owns the segments it has open. What memory of this host holds is copied, what files hold is read,
what lies on other hosts is left to a fetcher of its own (`OpenRemote`).

Invariants: every wait has a deadline, or ends if there is no progress; what `fetch` has brought was
of the promised version when it returned; a call that was cancelled or failed may write to its
addresses for a while yet, and `writing` says whether any does.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from typing import NamedTuple

import anyio

from weightbus.consumers.errors import DeadlineExceeded, SegmentUnavailable, TornRead
from weightbus.consumers.transfer.opening import too_short
from weightbus.consumers.transfer.progress import STEP_BYTES, Progress, run_while_moving
from weightbus.consumers.transfer.segments import OpenMemory, OpenSegment, SegmentCache
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
    "ReplaceableFetcher",
    "open_fetcher",
)

_logger = logging.getLogger(__name__)


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
    async def fetch(self, reads: Sequence[Read], stall_s: float) -> None:
        """Bring all of them; returns when every byte is there, and was of the promised version.

        Args:
            stall_s: it is given up when it gets on by no step (`STEP_BYTES`, or another source in
                place of one that failed) for so long. How long all of it takes depends on its size:
                whoever has a deadline cancels it.

        Raises:
            SegmentUnavailable: a segment is too short, cannot be read, or its host is lost.
            TornRead: a segment was seen to hold another version.
            DeadlineExceeded: there was no progress.
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
        """Whether a call that was left may still write to the addresses it was given, or has to
        forget them yet: until then they stay mapped."""

    @abstractmethod
    async def adopt(self, address: int, size_bytes: int) -> None:
        """Memory that reads will go to; where it needs no preparation, nothing is done.

        Raises:
            SegmentUnavailable: it cannot be prepared.
        """

    @abstractmethod
    async def release(self, address: int) -> None:
        """Undo `adopt`, if it was done. Never raises."""


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
                calls.when_ended(partial(_close, stack, cache))
            else:
                stack.close()
                self._kept.append(cache)

    def close(self) -> None:
        """Unmap everything that no call uses."""
        while self._kept:
            self._kept.pop().close()


def _close(stack: ExitStack, cache: SegmentCache) -> None:
    """In this order, in one thread: what is open lies in the cache's mappings."""
    stack.close()
    cache.close()


class LocalFetcher(Fetcher):
    """Shared memory and files of this host.

    Args:
        segments: number in the layout -> the segment; open until no call is running.
    """

    def __init__(self, segments: Mapping[int, OpenSegment], calls: Calls) -> None:
        self._segments, self._calls = segments, calls

    async def fetch(self, reads: Sequence[Read], stall_s: float) -> None:
        for read in reads:
            segment = self._segments[read.segment]
            if read.source + read.size_bytes > segment.size_bytes:
                raise too_short(segment.name, segment.size_bytes, read.source + read.size_bytes)
        left, progress = threading.Event(), Progress()

        async def copy() -> None:
            with progress.working():
                await self._calls.run(self._copy, reads, left, progress)

        try:
            await run_while_moving(copy, progress, stall_s, lambda: "fetch")
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

    def _copy(self, reads: Sequence[Read], left: threading.Event, progress: Progress) -> None:
        """Blocking. What it returns from was whole: others may have it."""
        for segment, source, address, size_bytes in reads:
            opened = self._segments[segment]
            for done in range(0, size_bytes, STEP_BYTES):
                if left.is_set():
                    return
                count = min(STEP_BYTES, size_bytes - done)
                if isinstance(opened, OpenMemory):  # memmove lets other threads run
                    ctypes.memmove(address + done, opened.address + source + done, count)
                else:
                    memory = (ctypes.c_ubyte * count).from_address(address + done)
                    opened.read_into(memoryview(memory).cast("B"), source + done)
                progress.made()
        for number in {read.segment for read in reads}:
            self._segments[number].check()

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

    async def fetch(self, reads: Sequence[Read], stall_s: float) -> None:
        shares: dict[Fetcher, list[Read]] = {}
        for read in reads:
            shares.setdefault(self._of_segment[read.segment], []).append(read)
        await run_together(
            partial(fetcher.fetch, share, stall_s) for fetcher, share in shares.items()
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


class ReplaceableFetcher(Fetcher):
    """What need not last, as long as it does; then, for good, what can be relied on.

    Args:
        name: of the first, for messages.
        is_offered: whether the first may still be read from.
    """

    def __init__(
        self, name: str, first: Fetcher, then: Fetcher, is_offered: Callable[[], bool]
    ) -> None:
        self._name, self._first, self._then = name, first, then
        self._is_offered = is_offered
        self._failed = False

    async def fetch(self, reads: Sequence[Read], stall_s: float) -> None:
        if not self._failed and not self._is_offered():
            self._drop("it is about to be overwritten, or gone")
        if not self._failed:
            try:
                await self._first.fetch(reads, stall_s)
            except (SegmentUnavailable, TornRead) as error:  # its threads have ended
                self._drop(str(error))
            else:
                return
        await self._then.fetch(reads, stall_s)

    async def check(self, deadline_s: float) -> None:
        """What came from the first was looked at when it came: it may change after that."""
        await self._then.check(deadline_s)

    def writing(self) -> bool:
        return self._first.writing() or self._then.writing()

    async def adopt(self, address: int, size_bytes: int) -> None:
        await self._first.adopt(address, size_bytes)
        await self._then.adopt(address, size_bytes)

    async def release(self, address: int) -> None:
        await self._first.release(address)
        await self._then.release(address)

    def _drop(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            _logger.warning("%s is not read from any more: %s", self._name, reason)


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
