"""Monitors: whatever happens on the bus, from any time on, for readers of any speed.

Owns core NATS subscriptions that only ring a bell; the messages are read from the streams, by their
sequence, when the reader asks for the next one. So

- history and what comes live are one thing: no gap between them, no repeat, one order;
- nobody waits for a reader and nothing is queued for it: at most one page of every stream is in
  memory. One that falls behind, or was stopped, or lost its connection reads on where it was;
- what the streams no longer keep by then is the only loss, and is said (`Missed`);
- messages of two streams come in the order in which they were stored, by the server's clock.

A bell may ring before its message is stored: what has rung is looked for again for a while, and
without a ring there is a look every `_IDLE_S`.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, overload

import anyio

from weightbus.bus.bell import Bell
from weightbus.bus.connection import Bus
from weightbus.bus.errors import BusTimeout, BusUnavailable, SettingInvalid
from weightbus.bus.jetstream import StoredMessage
from weightbus.bus.link import Incoming
from weightbus.bus.presence import EngineGone, PresenceWatch
from weightbus.bus.received import Received, Reconnected
from weightbus.bus.streams import last_kept
from weightbus.bus.subscription import matcher, merge
from weightbus.schemas.base import Message
from weightbus.schemas.catalogue import MONITORED, STREAMS, entry_of, pattern_of, stream_name
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointSkipped
from weightbus.schemas.progress import EngineState

__all__ = ("CaughtUp", "Missed", "Monitor", "MonitorEvent", "open_monitor")

_IDLE_S = 5.0
"""Between two looks at a stream of which nothing was heard."""
_CHECK_S = 30.0
"""After so long between two looks it is asked what the stream has dropped meanwhile."""
_LATE_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Waits between looks for a message that has rung and is not stored yet. A repeat, which a stream
drops, never is."""
_RETRY_S = 0.5
_CHANGES_IN_A_ROW = 64
"""Of engines, before messages have their turn."""

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Missed:
    """Something that was asked for is no longer kept, or may have been dropped before we read it.

    It stands where the gap is, and messages of the stream go on after it.
    """

    stream: str
    """Name in the catalogue: `CHECKPOINTS` or `PROGRESS`."""
    at_most: int | None
    """How many messages, of all kinds and models, were dropped there; None: not known."""


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """Said once: the history that was asked for, and the engines that were there when the monitor
    was opened, have come. What follows is news."""


MonitorEvent = Received[M] | EngineState | EngineGone | Missed | Reconnected | CaughtUp


@dataclass(slots=True)
class _Cursor:
    """Where a monitor is in one stream."""

    name: str
    """In the catalogue."""
    stream: str
    """On the server."""
    subject: str
    """Holds all that was asked for, and more."""
    created: str
    next_sequence: int
    opened_at: int
    """The last sequence when the monitor was opened."""
    connection: int
    """On which the stream was looked at last."""
    looked_s: float
    settled: int = 0
    """What was stored before this sequence is no loss any more: it has been read, or was not asked
    for."""
    buffer: deque[StoredMessage] = field(default_factory=deque)
    """The rest of the last page."""
    known_until_ns: int = 0
    """What was stored until then is in the buffer, or was."""
    is_behind: bool = False
    """There is more than was read."""
    has_passed: bool = False
    """It has read what was there when the monitor was opened."""

    @property
    def has_given_history(self) -> bool:
        return self.has_passed and (not self.buffer or self.buffer[0].sequence > self.opened_at)


class Monitor(Generic[M]):
    """An asynchronous iterator of `MonitorEvent`, for one reader; made by `open_monitor`.

    `anext` may be cancelled, and loses nothing. A server that does not answer is asked again for
    the bus's `reconnect_for_s`.

    Raises (from iteration):
        BusUnavailable: the connection is lost for good.
        BusTimeout: the server has not answered for too long.
        RequestRefused: the server does not let us read.
    """

    def __init__(
        self,
        bus: Bus,
        types: tuple[type[M], ...],
        patterns: Sequence[str],
        from_version: int,
        engines: PresenceWatch | None,
        bell: Bell,
    ) -> None:
        self._bus, self._types, self._from_version = bus, types, from_version
        self._asked_for = matcher(patterns)
        self._engines, self._bell = engines, bell
        self._opened_ns = bus.clock.now_ns()
        self._cursors: tuple[_Cursor, ...] = ()
        self._ready: deque[StoredMessage | Missed | CaughtUp] = deque()
        self._known_ns = 0
        """The latest time of anything that was seen."""
        self._is_caught_up = False
        self._was_reconnected = False
        self._is_closed = False
        self._error: BusUnavailable | None = None
        self._owed = 0
        """Messages that have rung and were not found yet."""
        self._late_looks = 0
        self._changes = 0
        """Of engines, since messages had their turn."""
        self._failing_since_s: float | None = None

    def __aiter__(self) -> AsyncIterator[MonitorEvent[M]]:
        return self

    async def __anext__(self) -> MonitorEvent[M]:
        while not self._is_closed:
            if (event := self._next_ready()) is not None:
                return event
            if self._error is not None:
                raise self._error
            try:
                if (change := await self._next_change()) is not None:
                    return change
                is_news = await self._look()
            except BusTimeout as error:
                await self._bear(error)
                continue
            self._failing_since_s = None
            if not is_news:
                await self._bell.wait(self._wait_s())
        raise StopAsyncIteration

    def rung_nowait(self, incoming: Incoming) -> None:
        self._owed += 1
        self._late_looks = 0
        self._bell.ring()

    def reconnected_nowait(self) -> None:
        self._was_reconnected = True
        self._bell.ring()

    def failed_nowait(self, error: BusUnavailable) -> None:
        self._error = error
        self._bell.ring()

    def start_nowait(self, cursors: Sequence[_Cursor], missed: Sequence[Missed]) -> None:
        """From where to read, and what is lost already."""
        self._cursors = tuple(cursors)
        self._ready.extend(missed)

    def close(self) -> None:
        self._is_closed = True
        self._bell.ring()

    def _next_ready(self) -> Received[M] | Missed | Reconnected | CaughtUp | None:
        """None: something must be looked for."""
        while self._ready:
            item = self._ready.popleft()
            if not isinstance(item, StoredMessage):
                return item
            if (received := self._read(item)) is not None:
                return received
        if self._was_reconnected:
            self._was_reconnected = False
            return Reconnected()
        return None

    def _read(self, stored: StoredMessage) -> Received[M] | None:
        """None: it is not what was asked for, or not readable. That is answered while it is new."""
        is_new = stored.stored_ns >= self._opened_ns
        readable = self._bus.readable(stored, is_answered=is_new)
        if readable is None or not isinstance(readable.message, self._types):
            return None
        message = readable.message
        if getattr(message, "version", self._from_version) < self._from_version:
            return None
        return Received(message, readable.subject, readable.headers, readable.received_ns)

    async def _next_change(self) -> EngineState | EngineGone | None:
        """Of an engine. History comes first, and messages have their turn in between."""
        if self._engines is None or not all(cursor.has_passed for cursor in self._cursors):
            return None
        change = None
        if self._changes < _CHANGES_IN_A_ROW:
            change = await self._engines.next_known()
        self._changes = 0 if change is None else self._changes + 1
        return change

    async def _look(self) -> bool:
        """Read on where nothing is left of the last page, and make ready what is due: whatever was
        stored before all that is not known yet.

        Returns: whether there is something, or more to be looked for at once.
        """
        for cursor in self._cursors:
            if not cursor.buffer:
                await self._read_page(cursor)
        due_until_ns = min(cursor.known_until_ns for cursor in self._cursors)
        while True:
            if not self._is_caught_up and all(c.has_given_history for c in self._cursors):
                if self._engines is not None and not self._engines.is_listed:
                    return True
                self._is_caught_up = True
                self._ready.append(CaughtUp())
            filled = [cursor for cursor in self._cursors if cursor.buffer]
            first = min(filled, key=lambda cursor: cursor.buffer[0].stored_ns, default=None)
            if first is None or first.buffer[0].stored_ns > due_until_ns:
                return bool(self._ready or filled) or any(c.is_behind for c in self._cursors)
            self._ready.append(first.buffer.popleft())

    async def _read_page(self, cursor: _Cursor) -> None:
        """The next page of a stream, and what was lost before it."""
        known_ns, began_s = self._known_ns, anyio.current_time()
        connection = self._bus.link.connections
        last_sequence = await self._check(cursor, began_s)
        messages, more = await self._bus.jetstream.page(
            cursor.stream, cursor.subject, cursor.next_sequence
        )
        dropped = await self._dropped_before(cursor, messages)
        # From here on nothing waits: a reader that is cancelled has taken in the page, or nothing.
        if dropped:
            self._ready.append(Missed(cursor.name, dropped))
        cursor.next_sequence = messages[-1].sequence + 1 if messages else cursor.next_sequence
        cursor.is_behind = more > 0
        if not more:
            cursor.settled = max(cursor.settled, last_sequence + 1)
        cursor.has_passed |= not more or cursor.next_sequence > cursor.opened_at
        cursor.looked_s, cursor.connection = began_s, connection
        cursor.known_until_ns = max((message.stored_ns for message in messages), default=known_ns)
        self._known_ns = max(self._known_ns, cursor.known_until_ns)
        asked_for = [each for each in messages if self._asked_for.fullmatch(each.subject)]
        self._owed = max(0, self._owed - len(asked_for))
        cursor.buffer.extend(asked_for)

    async def _check(self, cursor: _Cursor, now_s: float) -> int:
        """See what the stream has dropped from its beginning, if that may be something new.

        Returns: its last sequence; 0: there was no need to ask.
        """
        is_same = cursor.connection == self._bus.link.connections
        if is_same and not cursor.is_behind and now_s < cursor.looked_s + _CHECK_S:
            return 0
        state = await self._bus.jetstream.state(cursor.stream)
        unread = max(cursor.next_sequence, cursor.settled)
        if state.created != cursor.created or state.last_sequence < cursor.next_sequence - 1:
            self._ready.append(Missed(cursor.name, None))
            cursor.created, cursor.next_sequence, cursor.settled = state.created, 1, 0
        elif state.first_sequence > unread:
            self._ready.append(Missed(cursor.name, state.first_sequence - unread))
            cursor.settled = state.first_sequence
        return state.last_sequence

    async def _dropped_before(self, cursor: _Cursor, messages: Sequence[StoredMessage]) -> int:
        """How many messages were dropped before these from the midst of a stream that keeps the
        last few of each subject. None of ours was, unless these are as many of one subject."""
        limit = last_kept(cursor.name)
        counts = Counter(message.subject for message in messages)
        ends = [m.sequence for m in messages if limit is not None and counts[m.subject] >= limit]
        if not ends:
            return 0
        sequence = begin = max(cursor.next_sequence, cursor.settled)
        kept, more = 0, 1
        while more and sequence < ends[0]:
            page, more = await self._bus.jetstream.page(cursor.stream, ">", sequence)
            kept += sum(message.sequence < ends[0] for message in page)
            sequence = page[-1].sequence + 1 if page else ends[0]
        return max(0, ends[0] - begin - kept)

    def _wait_s(self) -> float:
        """Until the next look, if the bell does not ring."""
        wait_s = _IDLE_S if self._engines is None else min(_IDLE_S, self._engines.wait_s)
        if self._owed and self._late_looks < len(_LATE_S):
            self._late_looks += 1
            return min(wait_s, _LATE_S[self._late_looks - 1])
        self._owed = 0
        return wait_s

    async def _bear(self, error: BusTimeout) -> None:
        """Wait a little; raises the error if it has lasted for too long."""
        now_s = anyio.current_time()
        since_s = self._failing_since_s = self._failing_since_s or now_s
        if now_s - since_s >= self._bus.settings.reconnect_for_s:
            raise error
        await anyio.sleep(_RETRY_S)


@overload
def open_monitor(
    bus: Bus,
    *,
    model: str | None = None,
    since_ns: int | None = None,
    from_version: int | None = None,
    engines: bool = True,
) -> AbstractAsyncContextManager[Monitor[Message]]: ...


@overload
def open_monitor(
    bus: Bus,
    *message_types: type[M],
    model: str | None = None,
    since_ns: int | None = None,
    from_version: int | None = None,
    engines: bool = True,
) -> AbstractAsyncContextManager[Monitor[M]]: ...


def open_monitor(
    bus: Bus,
    *message_types: type[Any],
    model: str | None = None,
    since_ns: int | None = None,
    from_version: int | None = None,
    engines: bool = True,
) -> AbstractAsyncContextManager[Monitor[Any]]:
    """What happens on a bus: history if it is asked for, then what comes, see `Monitor`.

    Entered once what is published from now on will come. Nothing on the bus waits for the reader,
    however slow it is, or depends on it. One that blocks its event loop for long belongs in a
    process of its own, as with everything else in that loop.

    Args:
        message_types: none: all that monitors listen to, `schemas.catalogue.MONITORED`.
        model: None: of all models.
        since_ns: bus time, as `bus.clock` tells it; history comes from there on. 0: all that is
            kept. None: none, or that which `from_version` asks for.
        from_version: what is said of this version of `model` and later ones, from the moment on
            when the first of them was announced, or skipped.
        engines: whether engines' states are told too: those that are there now, after history,
            then every change.

    Raises:
        SettingInvalid: `from_version` without `model`, or with `since_ns`, or less than 0.
        MessageInvalid: a type is not one that is published on a subject.
    """
    if from_version is not None:
        if model is None or since_ns is not None:
            limit = "needs model, and excludes since_ns"
            raise SettingInvalid("from_version", from_version, limit)
        if from_version < 0:
            raise SettingInvalid("from_version", from_version, "must be at least 0")
    types = message_types or MONITORED
    return _opened(bus, types, model, since_ns, from_version, engines)


@asynccontextmanager
async def _opened(
    bus: Bus,
    types: tuple[type[Message], ...],
    model: str | None,
    since_ns: int | None,
    from_version: int | None,
    engines: bool,
) -> AsyncIterator[Monitor[Any]]:
    patterns = sorted({pattern_of(kind, bus.prefix, model) for kind in types})
    bell = Bell()
    async with AsyncExitStack() as stack:
        watch = None
        if engines:
            watch = await stack.enter_async_context(bus.presence.watch(model, bell))
        monitor = Monitor(bus, types, patterns, from_version or 0, watch, bell)
        stack.enter_context(bus.link.listen(monitor))
        for pattern in patterns:
            await stack.enter_async_context(bus.link.subscribe(pattern, monitor.rung_nowait))
        await bus.link.settle()
        missed = []
        if from_version is not None:
            assert model is not None
            since_ns, is_whole = await _announced_ns(bus, model, from_version)
            if not is_whole:
                missed.append(Missed(entry_of(CheckpointReady).stream, None))
        cursors = []
        for stream in reversed(STREAMS):  # of progress first: what it answers has been stored then
            kinds = [kind for kind in types if entry_of(kind).stream == stream.name]
            if kinds:
                subject = merge([pattern_of(kind, bus.prefix, model) for kind in kinds])
                cursors.append(await _cursor(bus, stream.name, subject, since_ns, missed))
        monitor.start_nowait(cursors, missed)
        try:
            yield monitor
        finally:
            monitor.close()


async def _cursor(
    bus: Bus, name: str, subject: str, since_ns: int | None, missed: list[Missed]
) -> _Cursor:
    """At the beginning of the history that is asked for; adds to `missed` what is not kept."""
    stream = stream_name(name, bus.prefix)
    state = await bus.jetstream.state(stream)
    first = state.last_sequence + 1
    if since_ns == 0:
        first = state.first_sequence
    elif since_ns is not None:
        first = await bus.jetstream.first_since(stream, since_ns) or first
        if state.first_sequence > 1 and state.first_ns > since_ns:
            missed.append(Missed(name, None))
    return _Cursor(
        name=name,
        stream=stream,
        subject=subject,
        created=state.created,
        next_sequence=first,
        opened_at=state.last_sequence,
        connection=bus.link.connections,
        looked_s=anyio.current_time(),
    )


async def _announced_ns(bus: Bus, model: str, version: int) -> tuple[int | None, bool]:
    """When the first version from `version` on was announced or skipped; None: none was yet. And
    whether that is certain: older announcements may have been dropped, then it is 0."""
    told: list[tuple[int, int]] = []
    async for received in bus.replay(CheckpointReady, CheckpointSkipped, model=model):
        message = received.message
        assert isinstance(message, CheckpointReady | CheckpointSkipped)
        told.append((message.version, received.received_ns))
    first = next((each for each in told if each[0] >= version), None)
    if first is None:
        return None, True
    limit = last_kept(entry_of(CheckpointReady).stream) or math.inf
    if first is told[0] and first[0] > version and len(told) >= limit:
        return 0, False
    return first[1], True
