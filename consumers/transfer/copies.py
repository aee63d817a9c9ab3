"""Whole copies of a version that engines keep, so that newcomers need not all ask the publisher.

`Copies` knows what others offer (it listens on the bus); `KeptCopy` is what this consumer offers,
and owns the copy's blocks: one for each segment, as a publisher's.

Invariants: a copy is offered only once its version is proven, and `CopyRetired` is said before it
is overwritten. No lease protects a copy: its generation words tell a reader that it has changed,
and the reader takes those bytes from somebody else.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import anyio
import anyio.abc
import anyio.to_thread

from weightbus.bus.background import open_background
from weightbus.bus.blocks import COPY_PREFIX, SharedBlock
from weightbus.bus.connection import Bus
from weightbus.bus.endpoint import Endpoint, register_block, unregister_block
from weightbus.bus.errors import (
    BusError,
    BusUnavailable,
    EndpointFailed,
    SubscriptionOverflow,
)
from weightbus.bus.received import Received
from weightbus.consumers.errands import keep_on
from weightbus.consumers.transfer.remote import Source
from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady, CopyReady, CopyRetired
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import (
    Placement,
    RemoteSegment,
    Segment,
    SharedMemorySegment,
)

__all__ = ("Copies", "KeptCopy", "open_copies", "open_kept_copy", "with_copies")

_logger = logging.getLogger(__name__)

MAX_WAYS = 8
"""To one segment, in a placement."""

MAX_SOURCES = 16
"""More than so many copies are not read from at once."""

RETRY_S = 0.5

CLOSE_S = 5.0
"""For the bus to take the last word of a copy."""


class Copies:
    """The copies of one model that other engines offer now; of `open_copies`."""

    def __init__(self, model: str, engine: str) -> None:
        self._model, self._engine = model, engine
        self._offered: dict[str, CopyReady] = {}

    def of(self, ready: CheckpointReady, layout_digest: str) -> tuple[CopyReady, ...]:
        """What is offered of one version: of this very checkpoint, in order of the engines."""
        return self.matching(ready.version, layout_digest, ready.created_ns)

    def matching(
        self, version: int, layout_digest: str, checkpoint_ns: int
    ) -> tuple[CopyReady, ...]:
        key = (version, layout_digest, checkpoint_ns)
        return tuple(
            copy
            for _, copy in sorted(self._offered.items())
            if (copy.version, copy.layout_digest, copy.checkpoint_ns) == key
        )

    def sources(
        self, version: int, layout_digest: str, checkpoint_ns: int, protocol: str
    ) -> list[Source]:
        """Those that can be read from another host by `protocol`."""
        sources = []
        for copy in self.matching(version, layout_digest, checkpoint_ns)[:MAX_SOURCES]:
            ways = {
                number: way
                for number, ways in enumerate(copy.placement)
                for way in ways
                if isinstance(way, RemoteSegment) and way.protocol == protocol
            }
            if ways:
                name = f"the copy of engine {copy.engine}"
                is_offered = partial(self._is_offered, copy)
                sources.append(Source(name, ways, own=False, is_offered=is_offered))
        return sources

    def hear(self, message: Message) -> None:
        match message:
            case CopyReady() as copy if copy.engine != self._engine:
                self._offered[copy.engine] = copy
            case CopyRetired() as gone:
                offered = self._offered.get(gone.engine)
                if offered is not None and offered.version <= gone.version:
                    del self._offered[gone.engine]

    def lose(self) -> None:
        """Nothing more will be heard: what is known may be outdated at any time."""
        self._offered.clear()

    def _is_offered(self, copy: CopyReady) -> bool:
        return self._offered.get(copy.engine) is copy


@asynccontextmanager
async def open_copies(bus: Bus, model: str, engine: str) -> AsyncIterator[Copies]:
    """Copies of other engines than `engine`; entered once it is known what is offered.

    A bus that is gone for good is for others to report: then no copy is known any more.

    Raises:
        BusUnavailable: at the start.
    """
    copies = Copies(model, engine)
    async with open_background() as tasks:
        await tasks.start(_listen, bus, model, copies)
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


async def _catch_up(bus: Bus, model: str, copies: Copies) -> None:
    """Hear what the bus has kept, however long the server takes to be ready for it."""
    while True:
        kept = await keep_on(_kept(bus, model))
        if kept is not None:
            break
        await anyio.sleep(RETRY_S)
    for message in kept:
        copies.hear(message)


async def _kept(bus: Bus, model: str) -> list[Message]:
    """What the bus has kept, in order."""
    return [received.message async for received in bus.replay(CopyReady, CopyRetired, model=model)]


class KeptCopy:
    """This consumer's copy of one version at a time; of `open_kept_copy`."""

    def __init__(
        self, bus: Bus, model: str, engine: str, host_id: str, endpoint: Endpoint | None
    ) -> None:
        self._bus, self._model, self._engine = bus, model, engine
        self._host_id, self._endpoint = host_id, endpoint
        self._blocks: tuple[SharedBlock, ...] = ()
        self._offered: CopyReady | None = None
        self._left: list[tuple[tuple[SharedBlock, ...], Callable[[], bool]]] = []

    @property
    def total_bytes(self) -> int:
        return sum(block.size_bytes for block in self._blocks)

    @property
    def is_registered(self) -> bool:
        """Whether the transfer engine knows the blocks: reads may go to them as they are."""
        return self._endpoint is not None

    async def begin(self, layout: Layout) -> tuple[SharedBlock, ...]:
        """A block for every segment, to be filled whole; what was offered is retired first.

        Raises:
            SharedMemoryFull, SharedMemoryUnavailable, EndpointFailed: there is no copy then.
            BusUnavailable, BusTimeout, RequestRefused: the copy that is offered stays.
        """
        await self._retire("it is overwritten by another version")
        self._left = [(blocks, writing) for blocks, writing in self._left if writing()]
        sizes = [segment.size_bytes for segment in layout.segments]
        if [block.size_bytes for block in self._blocks] != sizes:
            await anyio.to_thread.run_sync(self._renew, sizes)
        for block in self._blocks:
            block.begin_write()
        return self._blocks

    def end(self) -> tuple[SharedMemorySegment, ...]:
        """Every block is filled: where the engine's workers find them."""
        for block in self._blocks:
            block.end_write()
        return tuple(
            SharedMemorySegment(name=block.name, host_id=self._host_id, generation=block.generation)
            for block in self._blocks
        )

    def spoil(self, writing: Callable[[], bool]) -> None:
        """Filling failed: the blocks are not used again, and stay mapped while `writing()`."""
        blocks, self._blocks = self._blocks, ()
        self._drop(blocks)
        self._left.append((blocks, writing))

    async def offer(self, version: int, layout_digest: str, checkpoint_ns: int) -> None:
        """What was filled last is this version, proven: others may read it.

        Raises:
            BusUnavailable, BusTimeout, RequestRefused
        """
        if not self._blocks:
            return
        self._offered = CopyReady(
            model=self._model,
            version=version,
            engine=self._engine,
            layout_digest=layout_digest,
            placement=tuple(self._ways(block) for block in self._blocks),
            checkpoint_ns=checkpoint_ns,
            created_ns=time.time_ns(),
        )
        await self._bus.publish(self._offered)

    async def close(self) -> None:
        """Retire the copy and remove its blocks. Never raises: readers notice, too."""
        try:
            with anyio.move_on_after(CLOSE_S, shield=True):
                await self._retire("its engine's consumer ends")
        except BusError as error:
            _logger.warning("a copy ends unannounced: %s", error)
        finally:
            blocks, self._blocks = self._blocks, ()
            self._drop(blocks)

    async def _retire(self, reason: str) -> None:
        if self._offered is not None:
            version = self._offered.version
            await self._bus.publish(
                CopyRetired(model=self._model, version=version, engine=self._engine, reason=reason)
            )
            self._offered = None

    def _ways(self, block: SharedBlock) -> tuple[Segment, ...]:
        local = SharedMemorySegment(
            name=block.name, host_id=self._host_id, generation=block.generation
        )
        if self._endpoint is None:
            return (local,)
        remote = RemoteSegment(
            protocol=self._endpoint.protocol,
            session=self._endpoint.session,
            address=block.address,
            generation=block.generation,
        )
        return local, remote

    def _renew(self, sizes: Sequence[int]) -> None:
        """Blocking. The old blocks go first, so that there is never room needed for two copies."""
        blocks, self._blocks = self._blocks, ()
        self._drop(blocks)
        made: list[SharedBlock] = []
        try:
            for number, size_bytes in enumerate(sizes):
                unique = secrets.token_hex(8)
                name = f"{COPY_PREFIX}{self._model}.{self._engine}.{number}.{unique}"
                block = SharedBlock(name, size_bytes)
                if self._endpoint is not None:
                    try:
                        register_block(self._endpoint, block)
                    except EndpointFailed:
                        block.close()
                        raise
                made.append(block)
        except BaseException:
            self._drop(made)
            raise
        self._blocks = tuple(made)

    def _drop(self, blocks: Iterable[SharedBlock]) -> None:
        for block in blocks:
            if self._endpoint is not None:
                unregister_block(self._endpoint, block)
            block.close()


@asynccontextmanager
async def open_kept_copy(
    bus: Bus, model: str, engine: str, host_id: str, endpoint: Endpoint | None
) -> AsyncIterator[KeptCopy]:
    """Served as long as this is open; without `endpoint`, to engines of this host only."""
    kept = KeptCopy(bus, model, engine, host_id, endpoint)
    try:
        yield kept
    finally:
        await kept.close()


def with_copies(placement: Placement, copies: Sequence[CopyReady], host_id: str) -> Placement:
    """A placement with the ways that copies offer, after the publisher's own.

    Blocks of this host come before those of others; of other hosts only what can be read remotely
    is taken, and not more than a placement may hold.
    """
    return tuple(
        _merged(ways, [copy.placement[number] for copy in copies], host_id)
        for number, ways in enumerate(placement)
    )


def _merged(
    own: Sequence[Segment], of_copies: Sequence[Sequence[Segment]], host_id: str
) -> tuple[Segment, ...]:
    offered = [way for ways in of_copies for way in ways]
    near = [
        way for way in offered if isinstance(way, SharedMemorySegment) and way.host_id == host_id
    ]
    far = [way for way in offered if isinstance(way, RemoteSegment)]
    return (*own, *near[:1], *far)[:MAX_WAYS]
