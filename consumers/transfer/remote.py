"""Reads a version's segments from other hosts: from its publisher, and from copies of engines.

Owns no memory; knows which sources have failed. The transfer engine does the reading, in threads.

Invariants:
    A source's generation words are read before its first byte, and after the last byte of every
    call: what `fetch` has brought was of the promised version. What came from a copy that has
    changed meanwhile, or from a source that failed, is read again from another.
    A source that has not answered yet is not asked for bytes, and nobody waits for it as long as
    others have them. One that failed, changed, or said that it retires is not asked again.
    If the version's publisher has changed it, the version is torn, whatever copies there are.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import count

import anyio
import numpy as np

from weightbus.bus.background import open_background
from weightbus.bus.endpoint import Endpoint, RemoteRead
from weightbus.bus.errors import EndpointFailed, RemoteReadFailed
from weightbus.consumers.errors import DeadlineExceeded, SegmentUnavailable, TornRead
from weightbus.consumers.planning.reads import Batch, Reads, as_reads, plan_reads
from weightbus.consumers.transfer.fetch import Fetcher, Read
from weightbus.consumers.transfer.progress import Progress, run_while_moving
from weightbus.consumers.transfer.together import Calls, run_together
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import RemoteSegment
from weightbus.schemas.shared_memory import SHM_GENERATION_OFFSET, SHM_HEADER_BYTES

__all__ = ("RemoteFetcher", "Source", "open_remote_fetcher", "read_generations", "readers_at_once")

_logger = logging.getLogger(__name__)

MOST_READERS = 8

RELEASE_S = 2.0
"""For taking memory back from the transfer engine; what takes longer goes on without us."""

GRACE_S = 0.25
"""Who lives answers in a few milliseconds; the bytes are spread over those who have."""

POLL_S = 2e-3
"""Between two looks whether a source has answered."""


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
        self.has_answered = False
        """It was looked at, and had what it promised."""
        self.failure = ""
        """Why it is not asked any more; empty: it is."""

    @property
    def is_awaited(self) -> bool:
        return not self.has_answered and not self.failure

    def is_usable(self) -> bool:
        """Whether bytes may be read from it, now."""
        if self.is_awaited:
            return False
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
        self._calls, self._looks, self._memory = Calls(), Calls(), Calls()
        """Of reads, of looks at sources, and of changes to what is registered."""
        self._lock = threading.Lock()
        self._adopted: Counter[int] = Counter()
        """Address -> how often it is to be released yet."""
        self._releasing = 0
        """Releases that were asked for, and are not done."""
        self._torn: TornRead | None = None
        """The publisher has changed the version."""
        self._readers = anyio.Semaphore(readers_at_once())

    async def look_at(self, source: Source) -> None:
        """Find out whether it answers, and has what it promised: before its first byte is read."""
        await self._looks.run(self._look_at, source)

    async def contact(self, deadline_s: float) -> None:
        """Wait until somebody has answered for every segment, or nobody is left who might; the
        others have `GRACE_S` to join in at once.

        Raises:
            TornRead: the publisher holds another version.
            DeadlineExceeded
        """
        since_s = anyio.current_time()
        with anyio.move_on_after(deadline_s) as scope:
            await self._until_answered(self._sizes_bytes)
        if scope.cancelled_caught:
            raise DeadlineExceeded("contact with the sources", deadline_s)
        grace_s = min(deadline_s, GRACE_S) - (anyio.current_time() - since_s)
        with anyio.move_on_after(max(0.0, grace_s)):
            await self._until(lambda: not any(source.is_awaited for source in self._sources))
        if self._torn is not None:
            raise self._torn

    async def fetch(self, reads: Sequence[Read], stall_s: float) -> None:
        for read in reads:
            size_bytes = self._sizes_bytes[read.segment]
            if read.source + read.size_bytes > size_bytes:
                limit = f"must hold at least {read.source + read.size_bytes} bytes"
                raise SegmentUnavailable(f"{read.segment}", f"{size_bytes} bytes long", limit)
        call = _Call()

        async def fetch_all() -> None:
            wanted = as_reads(reads)
            while len(wanted):
                with call.progress.working():
                    await self._until_answered(np.unique(wanted["segment"]).tolist())
                wanted = await self._fetch_some(wanted, call)

        try:
            await run_while_moving(fetch_all, call.progress, stall_s, self._asked)
        finally:
            call.left.set()

    async def check(self, deadline_s: float) -> None:
        """Every call has seen to it, but for a publisher that has answered only now."""
        if self._torn is not None:
            raise self._torn

    def writing(self) -> bool:
        """Also while memory that was released, or whose adoption was left, is registered: whoever
        unmaps it then leaves the transfer engine with addresses that come again."""
        changing = self._memory.running > 0 or self._releasing > 0
        return self._calls.running > 0 or changing

    async def adopt(self, address: int, size_bytes: int) -> None:
        registered: list[int] = []

        def register() -> None:
            self._endpoint.register(address, size_bytes)
            registered.append(address)

        def undo() -> None:
            try:
                for one in registered:
                    self._unregister(one)
            finally:
                self._end_release()

        well = False
        try:
            await self._memory.run(register)
            with self._lock:
                self._adopted[address] += 1
            well = True
        except EndpointFailed as error:
            limit = "must be registered with the transfer engine"
            raise SegmentUnavailable(f"staging at {address:#x}", str(error), limit) from error
        finally:
            if not well:  # the call may have been left: what it does yet is undone after it
                with self._lock:
                    self._releasing += 1
                self._memory.when_ended(undo)

    async def release(self, address: int) -> None:
        """What a read that was left may still write to stays registered until it has ended; what
        was not adopted, or is released already, is left alone."""
        with self._lock:
            if not self._adopted[address]:
                return
            self._adopted[address] -= 1
            self._releasing += 1
        begun = threading.Lock()

        def forget() -> None:
            if not begun.acquire(blocking=False):
                return
            try:
                self._unregister(address)
            finally:
                self._end_release()

        if self._calls.running:
            self._calls.when_ended(forget)
            return
        with anyio.move_on_after(RELEASE_S, shield=True):
            await self._memory.run(forget)
        if not begun.locked():  # all threads were taken, and nobody else would do it
            threading.Thread(target=forget, name="weightbus-release", daemon=True).start()

    def _end_release(self) -> None:
        with self._lock:
            self._releasing -= 1

    def _unregister(self, address: int) -> None:
        try:
            self._endpoint.unregister(address)
        except EndpointFailed as error:
            _logger.warning("memory that was read into stays registered: %s", error)

    async def _until_answered(self, segments: Iterable[int]) -> None:
        """Somebody can be read from, for each of the segments that somebody may have.

        Raises:
            TornRead: the publisher holds another version.
        """
        open_yet = set(segments)

        def is_answered(segment: int) -> bool:
            holders = [source for source in self._sources if segment in source.ways]
            usable = any(source.is_usable() for source in holders)
            return usable or not any(source.is_awaited for source in holders)

        def are_all_answered() -> bool:
            open_yet.difference_update([one for one in open_yet if is_answered(one)])
            return self._torn is not None or not open_yet

        await self._until(are_all_answered)
        if self._torn is not None:
            raise self._torn

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for what threads bring about."""
        while True:
            if condition():
                return
            await anyio.sleep(POLL_S)

    async def _fetch_some(self, wanted: Reads, call: _Call) -> Reads:
        """Read all that is wanted, by one plan; what of it has to be read again."""
        candidates = self._candidates(wanted)
        again = [wanted[~np.isin(wanted["segment"], [n for _, ns, _ in candidates for n in ns])]]

        async def read_share(source: Source, batches: Sequence[Batch]) -> None:
            async with self._readers:
                with call.progress.working():
                    again.extend(await self._calls.run(self._read_share, source, batches, call))

        shares = [
            partial(read_share, source, batches)
            for some, _, sources in candidates
            for source, batches in self._plan(some, sources)
        ]
        await run_together(shares)
        return np.concatenate(again)

    def _asked(self) -> str:
        asked = ", ".join(
            source.name for source in self._sources if source.is_awaited or source.is_usable()
        )
        return f"fetch from {asked}"

    def _candidates(self, wanted: Reads) -> list[tuple[Reads, list[int], list[Source]]]:
        """The reads, by who has them, with their segments; without those that wait for somebody.

        Raises:
            SegmentUnavailable: nobody has some segment, and nobody will.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for segment in np.unique(wanted["segment"]).tolist():
            holders = [n for n, source in enumerate(self._sources) if segment in source.ways]
            usable = tuple(n for n in holders if self._sources[n].is_usable())
            if usable:
                groups.setdefault(usable, []).append(segment)
            elif not any(self._sources[n].is_awaited for n in holders):
                raise self._lost(segment)
        return [
            (
                wanted[np.isin(wanted["segment"], segments)],
                segments,
                [self._sources[n] for n in usable],
            )
            for usable, segments in groups.items()
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

    def _read_share(self, source: Source, batches: Sequence[Batch], call: _Call) -> list[Reads]:
        """Blocking. What of the batches has to be read again.

        Raises:
            TornRead: it is the publisher, and has changed the version.
        """
        segments = {int(segment) for batch in batches for segment in batch.reads["segment"]}
        unread = len(batches)
        try:
            for number, batch in enumerate(batches):
                if call.left.is_set():
                    return []
                if not source.is_usable():
                    unread = number
                    break
                self._read(source, batch)
                call.progress.made()
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

    def _look_at(self, source: Source) -> None:
        """Blocking."""
        try:
            self._check_generations(source, set(source.ways))
        except RemoteReadFailed as error:
            source.drop(str(error))
        except TornRead as error:
            if source.own:  # first: whoever waits for it sees at once that it is dropped
                self._torn = error
            source.drop(str(error))
        else:
            source.has_answered = True

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
        numbers = sorted(segments)
        ways = [source.ways[number] for number in numbers]
        found = read_generations(self._endpoint, ways)
        for number, way, generation in zip(numbers, ways, found, strict=True):
            if generation != way.generation:
                raise TornRead(f"{number} of {source.name}", way.generation, generation)

    def _lost(self, segment: int) -> SegmentUnavailable:
        reasons = [
            f"{source.name}: {source.failure}" for source in self._sources if segment in source.ways
        ]
        found = f"nowhere to be read ({'; '.join(reasons) or 'nobody offers it'})"
        return SegmentUnavailable(f"{segment}", found, "must have a source that lasts")


class _Call:
    """One call of `fetch`, as its threads know it."""

    def __init__(self) -> None:
        self.left = threading.Event()
        """Nobody waits for it any more."""
        self.progress = Progress()


def read_generations(endpoint: Endpoint, ways: Sequence[RemoteSegment]) -> list[int]:
    """The generation words of segments' blocks, those of one process together. Blocking.

    Raises:
        RemoteReadFailed: of the first process that cannot be read.
    """
    found = [0] * len(ways)
    for session in dict.fromkeys(way.session for way in ways):
        places = [place for place, way in enumerate(ways) if way.session == session]
        words = endpoint.read_words(
            session,
            [ways[place].address - SHM_HEADER_BYTES + SHM_GENERATION_OFFSET for place in places],
        )
        for place, word in zip(places, words, strict=True):
            found[place] = word
    return found


@asynccontextmanager
async def open_remote_fetcher(
    endpoint: Endpoint,
    copies: Sequence[Source],
    turn: int,
    ways: Mapping[int, RemoteSegment],
    layout: Layout,
    deadline_s: float,
) -> AsyncIterator[Fetcher]:
    """As `OpenRemote`, once the first three arguments are bound. All sources are looked at, at
    once; who has not answered when this is entered may come in later.

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
    async with open_background() as tasks:
        for source in [*sources, *copies]:
            tasks.start_soon(fetcher.look_at, source)
        await fetcher.contact(deadline_s)
        yield fetcher
