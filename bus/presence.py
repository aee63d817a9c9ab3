"""Which engines are there: heartbeats in a bucket whose keys expire with them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import msgspec

from weightbus.bus.bell import Bell
from weightbus.bus.buckets import KeyBucket, is_end, ttl_of
from weightbus.bus.errors import BusUnavailable
from weightbus.bus.link import Incoming, Link
from weightbus.schemas.catalogue import check_token
from weightbus.schemas.progress import EngineState

__all__ = ("EngineGone", "Presence", "PresenceWatch")

_EXPIRY_SLACK_S = 0.25
"""A heartbeat that is a little late on its way is no death."""
_QUEUE_CHANGES = 4096

_Engine = tuple[str, str]
"""Model and name."""


@dataclass(frozen=True, slots=True)
class EngineGone:
    """An engine has taken leave, or its heartbeat has stopped."""

    model: str
    engine: str


class Presence:
    """The bus's heartbeats.

    Every method raises, besides what it names:

    Raises:
        BusUnavailable, BusTimeout, RequestRefused, MessageInvalid
    """

    ttl_s: int
    """How long an engine counts as present after its last heartbeat: send one every third of it."""

    def __init__(self, link: Link, bucket: KeyBucket[EngineState], ttl_s: int) -> None:
        self._link = link
        self._bucket = bucket
        self.ttl_s = ttl_s

    async def put(self, state: EngineState) -> None:
        """A heartbeat: the engine is there, in this state, for `ttl_s` from now."""
        await self._bucket.put(state, self.ttl_s)

    async def drop(self, model: str, engine: str) -> None:
        """Take leave at once."""
        await self._bucket.delete(f"{model}.{engine}")

    async def get(self, model: str, engine: str) -> EngineState | None:
        """The last heartbeat of an engine; None: it is not there."""
        return (await self._bucket.get(f"{model}.{engine}")).message

    async def list(self, model: str | None) -> tuple[EngineState, ...]:
        """The engines of a model that are there; None: of all models."""
        found = {
            _key(kept.message): kept.message
            async for kept in self._bucket.scan(_pattern(model))
            if kept.message is not None
        }
        return tuple(found.values())

    @asynccontextmanager
    async def watch(
        self, model: str | None, bell: Bell | None = None
    ) -> AsyncIterator[PresenceWatch]:
        """The engines of a model that are there, then every change; None: of all models.

        `bell`: of a reader that waits for other things too, and takes `next_known` only.

        Expiry is noticed within `ttl_s` + 1 s of the last heartbeat that could be heard. A lost
        connection is no sign of anything: when it is back, the list is read again, and an engine
        that is missing has `ttl_s` to be heard.
        """
        keys = _pattern(model)
        watch = PresenceWatch(self._bucket, keys, bell or Bell())
        with self._link.listen(watch):
            async with self._link.subscribe(self._bucket.subject(keys), watch.deliver_nowait):
                yield watch


@dataclass(slots=True)
class _Known:
    """What a watch knows of one engine."""

    state: EngineState
    ttl_s: int
    """0: it does not expire."""
    expires: float
    """When it is late, by the event loop's clock."""


class PresenceWatch:
    """An asynchronous iterator of `EngineState` and `EngineGone`; made by `Presence.watch`.

    A heartbeat that says nothing new but its time is not reported. Expiry is noticed while the
    reader waits, by the reader's clock: clocks are never compared.

    Raises (from iteration):
        BusUnavailable: the connection is lost for good.
        BusTimeout, RequestRefused
    """

    def __init__(self, bucket: KeyBucket[EngineState], keys: str, bell: Bell) -> None:
        self._bucket = bucket
        self._keys = keys
        self._bell = bell
        self._known: dict[_Engine, _Known] = {}
        self._ready: deque[EngineState | EngineGone] = deque()
        self._inbox: deque[Incoming] = deque()
        self._lists_wanted, self._lists_done = 1, 0
        self._look_at = math.inf
        """Not later than the first expiry: heartbeats move that one and leave this as it is."""
        self._error: BusUnavailable | None = None

    def __aiter__(self) -> AsyncIterator[EngineState | EngineGone]:
        return self

    async def __anext__(self) -> EngineState | EngineGone:
        while (change := await self.next_known()) is None:
            await self._bell.wait(self.wait_s)
        return change

    @property
    def is_listed(self) -> bool:
        """The engines that were there when the watch began have been read."""
        return self._lists_done > 0

    @property
    def wait_s(self) -> float:
        """How long it is, if nothing is heard, until there may be something to know."""
        return self._look_at - anyio.current_time()

    async def next_known(self) -> EngineState | EngineGone | None:
        """The next change; None: there is none until the bell rings or `wait_s` is over."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            if self._lists_done < self._lists_wanted:
                await self._list()
            elif self._inbox:
                self._hear(self._inbox.popleft())
            elif anyio.current_time() >= self._look_at:
                await self._look_for_late()
            else:
                return None
        return self._ready.popleft()

    def deliver_nowait(self, incoming: Incoming) -> None:
        if len(self._inbox) < _QUEUE_CHANGES:
            self._inbox.append(incoming)
        else:  # the list says the same, and takes less room
            self._inbox.clear()
            self._lists_wanted += 1
        self._bell.ring()

    def reconnected_nowait(self) -> None:
        self._lists_wanted += 1
        self._bell.ring()

    def failed_nowait(self, error: BusUnavailable) -> None:
        self._error = error
        self._bell.ring()

    async def _list(self) -> None:
        """An engine that is missing had no chance to be heard: it is given its time again."""
        wanted = self._lists_wanted
        async for kept in self._bucket.scan(self._keys):
            if kept.message is not None:
                self._learn(kept.message, kept.ttl_s)
        for known in self._known.values():
            known.expires = _expiry(known.ttl_s)
        self._look_at = self._first_expiry()
        self._lists_done = wanted

    def _hear(self, incoming: Incoming) -> None:
        if is_end(incoming.headers):
            *_, model, engine = incoming.subject.split(".")
            self._forget((model, engine))
            return
        state = self._bucket.read(incoming.subject, incoming.headers, incoming.payload)
        if state is not None:
            self._learn(state, ttl_of(incoming.headers))

    async def _look_for_late(self) -> None:
        now = anyio.current_time()
        for engine in [engine for engine, known in self._known.items() if known.expires <= now]:
            await self._check(engine)
        self._look_at = self._first_expiry()

    async def _check(self, engine: _Engine) -> None:
        """Gone, unless there is a heartbeat that we have not heard."""
        kept = await self._bucket.get(".".join(engine))
        if self._lists_done < self._lists_wanted:
            return  # the connection was lost meanwhile: the list says more
        known = self._known[engine].state
        if kept.message is None or kept.message == known:
            self._forget(engine)
        else:  # it beats; were its time the smaller one, then its clock was set back
            self._take(kept.message, kept.ttl_s)

    def _learn(self, state: EngineState, ttl_s: int) -> None:
        known = self._known.get(_key(state))
        if known is not None and _is_older(state, known.state):
            return
        self._take(state, ttl_s)

    def _take(self, state: EngineState, ttl_s: int) -> None:
        known = self._known.get(_key(state))
        expires = _expiry(ttl_s)
        self._known[_key(state)] = _Known(state, ttl_s, expires)
        self._look_at = min(self._look_at, expires)
        if known is None or _content(known.state) != _content(state):
            self._ready.append(state)

    def _forget(self, engine: _Engine) -> None:
        if self._known.pop(engine, None) is not None:
            self._ready.append(EngineGone(*engine))

    def _first_expiry(self) -> float:
        return min((known.expires for known in self._known.values()), default=math.inf)


def _key(state: EngineState) -> _Engine:
    return state.model, state.engine


def _pattern(model: str | None) -> str:
    """The keys of a model's engines, or of all."""
    return f"{'*' if model is None else check_token('model', model)}.*"


def _expiry(ttl_s: int) -> float:
    return anyio.current_time() + ttl_s + _EXPIRY_SLACK_S if ttl_s else math.inf


def _is_older(state: EngineState, known: EngineState) -> bool:
    """A list and what was heard meanwhile may overlap."""
    return state.consumer == known.consumer and state.updated_ns < known.updated_ns


def _content(state: EngineState) -> EngineState:
    return msgspec.structs.replace(state, updated_ns=0)
