"""Monitors: whatever happens on the bus, from any time on, for readers of any speed.

Owns core NATS subscriptions that only ring a bell; the messages are read from the streams, by their
sequence, when the reader asks for the next one (`weightbus.bus.tail`). So

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
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Generic, TypeVar, overload

import anyio

from weightbus.bus.bell import Bell
from weightbus.bus.connection import Bus
from weightbus.bus.errors import BusTimeout, BusUnavailable, SettingInvalid
from weightbus.bus.jetstream import StoredMessage
from weightbus.bus.link import Incoming
from weightbus.bus.presence import EngineGone, PresenceWatch
from weightbus.bus.received import CaughtUp, Missed, Received, Reconnected
from weightbus.bus.streams import last_kept
from weightbus.bus.subscription import matcher, merge
from weightbus.bus.tail import Tail, open_tail
from weightbus.schemas.base import Message
from weightbus.schemas.catalogue import MONITORED, STREAMS, entry_of, pattern_of
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointSkipped
from weightbus.schemas.progress import EngineState

__all__ = (
    "CaughtUp",
    "EngineGone",
    "Missed",
    "Monitor",
    "MonitorEvent",
    "Received",
    "Reconnected",
    "open_monitor",
)

_IDLE_S = 5.0
"""Between two looks at a stream of which nothing was heard."""
_LATE_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Waits between looks for a message that has rung and is not stored yet. A repeat, which a stream
drops, never is; neither is it found where the stream was made anew."""
_RETRY_S = 0.5
_CHANGES_IN_A_ROW = 64
"""Of engines, before messages have their turn."""

M = TypeVar("M", bound=Message)


MonitorEvent = Received[M] | EngineState | EngineGone | Missed | Reconnected | CaughtUp


class Monitor(Generic[M]):
    """An asynchronous iterator of `MonitorEvent`, for one reader; made by `open_monitor`.

    After `Reconnected` comes what was published meanwhile, and `Missed` if some of it is not kept
    any more. Engines have no history: of several changes that were not read the last may stand
    for all. What cannot be read is left out, and answered on `dead` if it is new.

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
        from_version: int,
        engines: PresenceWatch | None,
        bell: Bell,
    ) -> None:
        self._bus, self._types, self._from_version = bus, types, from_version
        self._engines, self._bell = engines, bell
        self._opened_ns = bus.clock.now_ns()
        self._tails: tuple[Tail, ...] = ()
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

    @property
    def is_answered(self) -> bool:
        """False: the server has not answered when it was last asked, and is asked again."""
        return self._failing_since_s is None

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

    def start_nowait(self, tails: Sequence[Tail], missed: Sequence[Missed]) -> None:
        """From where to read, and what is lost already."""
        self._tails = tuple(tails)
        self._ready.extend(missed)

    def close(self) -> None:
        self._is_closed = True
        self._bell.ring()

    def _next_ready(self) -> Received[M] | Missed | Reconnected | CaughtUp | None:
        """None: something must be looked for."""
        if self._was_reconnected:
            self._was_reconnected = False
            return Reconnected()
        while self._ready:
            item = self._ready.popleft()
            if not isinstance(item, StoredMessage):
                return item
            if (received := self._read(item)) is not None:
                return received
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
        if self._engines is None or not all(tail.has_passed for tail in self._tails):
            return None
        change = None
        if self._changes < _CHANGES_IN_A_ROW:
            change = await self._engines.next_known()
        else:
            self._bell.ring()  # there may be more of them, when messages have had their turn
        self._changes = 0 if change is None else self._changes + 1
        return change

    async def _look(self) -> bool:
        """Read on where nothing is left of the last page, and make ready what is due: whatever was
        stored before all that is not known yet.

        Returns: whether there is something, or more to be looked for at once.
        """
        for tail in self._tails:
            if not tail.buffer:
                self._ready.extend(await tail.read(self._known_ns))
                self._known_ns = max(self._known_ns, tail.known_until_ns)
                self._owed = max(0, self._owed - len(tail.buffer))
        due_until_ns = min(tail.known_until_ns for tail in self._tails)
        while True:
            if not self._is_caught_up and all(c.has_given_history for c in self._tails):
                if self._engines is not None and not self._engines.is_listed:
                    return True
                self._is_caught_up = True
                self._ready.append(CaughtUp())
            filled = [tail for tail in self._tails if tail.buffer]
            first = min(filled, key=lambda tail: tail.buffer[0].stored_ns, default=None)
            if first is None or first.buffer[0].stored_ns > due_until_ns:
                return bool(self._ready or filled) or any(c.is_behind for c in self._tails)
            self._ready.append(first.buffer.popleft())

    def _wait_s(self) -> float:
        """Until the next look, if the bell does not ring."""
        wait_s = _IDLE_S if self._engines is None else min(_IDLE_S, self._engines.wait_s)
        if self._owed and self._late_looks < len(_LATE_S):
            self._late_looks += 1
            return min(wait_s, _LATE_S[self._late_looks - 1])
        if self._owed:
            self._owed = 0
            for tail in self._tails:
                tail.doubt_nowait()
            return 0.0
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
    asked_for, bell = matcher(patterns), Bell()
    async with AsyncExitStack() as stack:
        watch = None
        if engines:
            watch = await stack.enter_async_context(bus.presence.watch(model, bell))
        monitor = Monitor(bus, types, from_version or 0, watch, bell)
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
        tails = []
        for stream in reversed(STREAMS):  # of progress first: what it answers has been stored then
            kinds = [kind for kind in types if entry_of(kind).stream == stream.name]
            if kinds:
                subject = merge([pattern_of(kind, bus.prefix, model) for kind in kinds])
                tail, lost = await open_tail(
                    bus.jetstream, bus.link, stream.name, bus.prefix, subject, asked_for, since_ns
                )
                tails.append(tail)
                missed += lost
        monitor.start_nowait(tails, missed)
        try:
            yield monitor
        finally:
            monitor.close()


async def _announced_ns(bus: Bus, model: str, version: int) -> tuple[int | None, bool]:
    """When the first version from `version` on was announced or skipped; None: none was yet. And
    whether that is certain: older announcements may have been dropped, then it is 0."""
    told: list[tuple[int, int]] = []
    kinds = CheckpointReady, CheckpointSkipped
    async for received in bus.replay(*kinds, model=model, is_answered=False):
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
