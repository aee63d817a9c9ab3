"""Whole copies of a version that other engines keep, so that newcomers need not all ask the
publisher.

Owns what is known of them: it listens on the bus. What this consumer offers itself is in
`weightbus.consumers.transfer.kept`.

Invariants: what is offered is looked at before it is relied on, and what does not fit the version's
layout is dropped. Copies of engines that are not present are not named. No lease protects a copy:
its generation words tell a reader that it has changed, and the reader takes those bytes from
somebody else.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, NamedTuple, TypeVar

import anyio
import anyio.abc

from weightbus.bus.background import open_background
from weightbus.bus.connection import Bus
from weightbus.bus.errors import BusUnavailable, SubscriptionOverflow
from weightbus.bus.presence import EngineGone
from weightbus.bus.received import Received
from weightbus.consumers.errands import keep_on
from weightbus.consumers.transfer.remote import Source
from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady, CopyReady, CopyRetired
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.layout import Layout
from weightbus.schemas.layout_codec import check_placement
from weightbus.schemas.placement import Placement, RemoteSegment, SharedMemorySegment
from weightbus.schemas.progress import EngineState

__all__ = ("Copies", "CopyHere", "open_copies", "with_copies")

T = TypeVar("T")
Way = TypeVar("Way", RemoteSegment, SharedMemorySegment)

_logger = logging.getLogger(__name__)

MAX_WAYS: Final = 8
"""To one segment, in a placement."""

MAX_SOURCES: Final = 16
"""More than so many copies are not read from at once."""

MAX_OFFERS: Final = 1024
"""Copies that are remembered, one of each engine; of more, those heard first are forgotten."""

RETRY_S: Final = 0.5


class CopyHere(NamedTuple):
    """A copy that lies in shared memory of this host."""

    name: str
    """For messages."""
    ways: Mapping[int, SharedMemorySegment]
    """Of every segment."""
    is_offered: Callable[[], bool]
    """Whether it still is."""


class Copies:
    """The copies of one model that other engines offer now; of `open_copies`."""

    def __init__(self, model: str, engine: str) -> None:
        self._model, self._engine = model, engine
        self._offered: dict[str, CopyReady] = {}
        self._present: dict[str, str] = {}
        """Engine -> its consumer."""

    def of(
        self, ready: CheckpointReady, layout_digest: str, layout: Layout
    ) -> tuple[CopyReady, ...]:
        """What is offered of one version: of this very checkpoint, in order of the engines."""
        return self.matching(ready.version, layout_digest, ready.created_ns, layout)

    def matching(
        self, version: int, layout_digest: str, checkpoint_ns: int, layout: Layout
    ) -> tuple[CopyReady, ...]:
        """As `of`. What claims to be of this layout, and is not, is told and forgotten."""
        key = (version, layout_digest, checkpoint_ns)
        found = []
        for engine, copy in sorted(self._offered.items()):
            if (copy.version, copy.layout_digest, copy.checkpoint_ns) != key:
                continue
            if engine not in self._present:
                continue
            try:
                _check(copy, layout)
            except MessageInvalid as error:
                del self._offered[engine]
                _logger.warning("the copy of engine %s is not read: %s", engine, error)
            else:
                found.append(copy)
        return tuple(found)

    def sources(self, offered: Sequence[CopyReady], protocol: str) -> list[Source]:
        """Those that can be read from another host by `protocol`."""
        sources = []
        for copy in offered[:MAX_SOURCES]:
            ways = _ways(copy, RemoteSegment, lambda way: way.protocol == protocol)
            if ways:
                is_offered = partial(self._is_offered, copy)
                sources.append(Source(_name(copy), ways, own=False, is_offered=is_offered))
        return sources

    def here(self, offered: Sequence[CopyReady], host_id: str) -> list[CopyHere]:
        """Those of which every segment lies in shared memory of this host."""
        here = []
        for copy in offered[:MAX_SOURCES]:
            ways = _ways(copy, SharedMemorySegment, lambda way: way.host_id == host_id)
            if len(ways) == len(copy.placement):
                here.append(CopyHere(_name(copy), ways, partial(self._is_offered, copy)))
        return here

    def hear(self, message: Message) -> None:
        match message:
            case CopyReady() as copy if copy.engine != self._engine:
                self._offered.pop(copy.engine, None)
                self._offered[copy.engine] = copy
                if len(self._offered) > MAX_OFFERS:
                    del self._offered[next(iter(self._offered))]
            case CopyRetired() as gone:
                offered = self._offered.get(gone.engine)
                if offered is not None and offered.version <= gone.version:
                    del self._offered[gone.engine]
            case EngineState() as state:
                known = self._present.get(state.engine, state.consumer)
                if known != state.consumer:  # the one before took its copy along
                    self._offered.pop(state.engine, None)
                self._present[state.engine] = state.consumer

    def lose_engine(self, engine: str) -> None:
        """It has left: nobody reads from its copy, nor waits for it."""
        self._present.pop(engine, None)
        self._offered.pop(engine, None)

    def lose(self) -> None:
        """Nothing more will be heard: what is known may be outdated at any time."""
        self._offered.clear()

    def _is_offered(self, copy: CopyReady) -> bool:
        return self._offered.get(copy.engine) is copy


@asynccontextmanager
async def open_copies(bus: Bus, model: str, engine: str) -> AsyncIterator[Copies]:
    """Copies of other engines than `engine`; entered once it is known what is offered, and by whom
    of those who are present.

    A bus that is gone for good is for others to report: then no copy is known any more.

    Raises:
        BusUnavailable: at the start.
    """
    copies = Copies(model, engine)
    async with open_background() as tasks:
        await tasks.start(_listen, bus, model, copies)
        await tasks.start(_watch, bus, model, copies)
        yield copies


async def _listen(
    bus: Bus, model: str, copies: Copies, *, task_status: anyio.abc.TaskStatus[None]
) -> None:
    async with bus.subscribe(CopyReady, CopyRetired, model=model) as messages:
        await _catch_up(bus, model, copies)
        task_status.started()
        try:
            async for heard in messages:
                if isinstance(heard, Received):
                    copies.hear(heard.message)
                else:
                    await _catch_up(bus, model, copies)
        except (BusUnavailable, SubscriptionOverflow) as error:
            copies.lose()
            _logger.warning("copies of other engines are not known any more: %s", error)


async def _watch(
    bus: Bus, model: str, copies: Copies, *, task_status: anyio.abc.TaskStatus[None]
) -> None:
    async with bus.presence.watch(model) as changes:
        for state in await _ask(partial(bus.presence.list, model)):
            copies.hear(state)
        task_status.started()
        try:
            while True:
                match await keep_on(anext(changes)):
                    case EngineState() as state:
                        copies.hear(state)
                    case EngineGone(engine=engine):
                        copies.lose_engine(engine)
                    case None:
                        await anyio.sleep(RETRY_S)
        except BusUnavailable as error:
            copies.lose()
            _logger.warning("it is not known any more whose copies there are: %s", error)


async def _catch_up(bus: Bus, model: str, copies: Copies) -> None:
    """Hear what the bus has kept."""
    for message in await _ask(partial(_kept, bus, model)):
        copies.hear(message)


async def _ask(request: Callable[[], Awaitable[Sequence[T]]]) -> Sequence[T]:
    """What the bus answers, however long the server takes to be ready for it."""
    while True:
        answer = await keep_on(request())
        if answer is not None:
            return answer
        await anyio.sleep(RETRY_S)


async def _kept(bus: Bus, model: str) -> list[Message]:
    """What the bus has kept, in order."""
    return [received.message async for received in bus.replay(CopyReady, CopyRetired, model=model)]


def _name(copy: CopyReady) -> str:
    return f"the copy of engine {copy.engine}"


def _ways(copy: CopyReady, kind: type[Way], is_wanted: Callable[[Way], bool]) -> dict[int, Way]:
    """Number of a segment -> its way of one kind that is wanted, if there is one."""
    return {
        number: way
        for number, ways in enumerate(copy.placement)
        for way in ways
        if isinstance(way, kind) and is_wanted(way)
    }


def with_copies(placement: Placement, copies: Sequence[CopyReady]) -> Placement:
    """A placement with what copies offer to other hosts, after the publisher's own ways, and no
    more ways than a placement may hold.

    Blocks of this host are left out: whoever was offered them would read them in place, and nobody
    protects a copy. See `Copies.here`.
    """
    return tuple(
        (
            *own,
            *(
                way
                for copy in copies
                for way in copy.placement[number]
                if isinstance(way, RemoteSegment)
            ),
        )[:MAX_WAYS]
        for number, own in enumerate(placement)
    )


def _check(copy: CopyReady, layout: Layout) -> None:
    """What another engine says of its copy, before it is relied on.

    Raises:
        MessageInvalid: it does not fit the layout, or offers what is being written.
    """
    check_placement(layout, copy.placement)
    for number, ways in enumerate(copy.placement):
        for way in ways:
            if not isinstance(way, SharedMemorySegment | RemoteSegment):
                kind, limit = type(way).__name__, "must be shared or registered memory"
                raise MessageInvalid("placement", f"$[{number}]", kind, limit)
            if way.generation % 2:
                limit = "must be even: odd ones are of blocks that are being written"
                raise MessageInvalid("placement", f"$[{number}].generation", way.generation, limit)
