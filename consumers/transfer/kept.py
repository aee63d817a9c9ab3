"""The whole copy of a version that this consumer keeps, so that others can read it from here.

Owns its blocks of shared memory, one for each segment, as a publisher's; what they are registered
as with the transfer engine; and blocks that something may still write to although their transfer
has ended.

Invariants: a copy is offered only once its version is proven, and `CopyRetired` is said before it
is overwritten. Memory stays mapped and registered until nothing writes to it any more, if need be
as long as this process.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

import anyio
import anyio.to_thread

from weightbus.bus.blocks import COPY_PREFIX, SharedBlock
from weightbus.bus.connection import Bus
from weightbus.bus.endpoint import Endpoint, register_block
from weightbus.bus.errors import BusError, EndpointFailed
from weightbus.schemas.checkpoint import CopyReady, CopyRetired
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import RemoteSegment, Segment, SharedMemorySegment
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES

__all__ = ("KeptCopy", "open_kept_copy")

_logger = logging.getLogger(__name__)

CLOSE_S: Final = 5.0
"""For the bus to take the last word of a copy, and then for the transfer engine to let go of it."""


class _Grave(NamedTuple):
    """Memory that is not used again."""

    memory: memoryview
    """Keeps it mapped."""
    registered: int
    """Where the transfer engine knows it; 0: nowhere."""
    writing: Callable[[], bool]


_LEFT: Final[list[_Grave]] = []
"""Graves that nobody could wait for: their memory stays as long as this process."""


def _nobody() -> bool:
    return False


class KeptCopy:
    """This consumer's copy of one version at a time; of `open_kept_copy`."""

    def __init__(
        self, bus: Bus, model: str, engine: str, host_id: str, endpoint: Endpoint | None
    ) -> None:
        self._bus, self._model, self._engine = bus, model, engine
        self._host_id, self._endpoint = host_id, endpoint
        self._blocks: tuple[SharedBlock, ...] = ()
        self._is_whole = False
        """What was begun last is filled."""
        self._offered: CopyReady | None = None
        self._graves: list[_Grave] = []
        self._writing = _nobody
        """Whether who filled the blocks last has them registered yet."""
        self._is_closed = False

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
        self._is_whole = False
        await self._retire("it is overwritten by another version")
        sizes = [segment.size_bytes for segment in layout.segments]
        await anyio.to_thread.run_sync(self._renew, sizes)
        for block in self._blocks:
            block.begin_write()
        return self._blocks

    def end(self, writing: Callable[[], bool] = _nobody) -> tuple[SharedMemorySegment, ...]:
        """Every block is filled: where the engine's workers find them.

        Args:
            writing: while it says so, their memory stays mapped.
        """
        self._writing = writing
        for block in self._blocks:
            block.end_write()
        self._is_whole = True
        return tuple(
            SharedMemorySegment(name=block.name, host_id=self._host_id, generation=block.generation)
            for block in self._blocks
        )

    def spoil(self, writing: Callable[[], bool]) -> None:
        """Filling failed: the blocks are not used again, and stay mapped, and known to the transfer
        engine, while `writing()`. Waits for nothing."""
        blocks, self._blocks = self._blocks, ()
        self._is_whole = False
        self._bury(blocks, writing)

    async def offer(self, version: int, layout_digest: str, checkpoint_ns: int) -> None:
        """What was filled last is this version, proven: others may read it. Nothing is offered if
        what was begun last has not been filled.

        Raises:
            BusUnavailable, BusTimeout, RequestRefused
        """
        if not self._is_whole:
            return
        self._offered = CopyReady(
            model=self._model,
            version=version,
            engine=self._engine,
            layout_digest=layout_digest,
            placement=tuple(self._ways(block) for block in self._blocks),
            checkpoint_ns=checkpoint_ns,
            created_ns=self._bus.clock.now_ns(),
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
            self._is_closed = True
            self.spoil(self._writing)
            with anyio.move_on_after(CLOSE_S, shield=True):
                await anyio.to_thread.run_sync(self._reap, abandon_on_cancel=True)
            _LEFT.extend(self._graves)

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
        fits = [block.size_bytes for block in self._blocks] == sizes
        if not fits:
            self.spoil(self._writing)
        self._reap()
        if fits:
            return
        made: list[SharedBlock] = []
        try:
            for number, size_bytes in enumerate(sizes):
                made.append(self._make(number, size_bytes))
        except BaseException:
            self._bury(made, _nobody)
            raise
        self._blocks = tuple(made)

    def _make(self, number: int, size_bytes: int) -> SharedBlock:
        unique = secrets.token_hex(8)
        name = f"{COPY_PREFIX}{self._model}.{self._engine}.{number}.{unique}"
        block = SharedBlock(name, size_bytes)
        if self._endpoint is not None:
            try:
                register_block(self._endpoint, block)
            except EndpointFailed:
                block.close()
                raise
        return block

    def _bury(self, blocks: Sequence[SharedBlock], writing: Callable[[], bool]) -> None:
        """Their names go at once, and with them the lock: nobody opens them any more."""
        for block in blocks:
            registered = 0 if self._endpoint is None else block.address - SHM_HEADER_BYTES
            self._graves.append(_Grave(block.data, registered, writing))
            block.close()

    def _reap(self) -> None:
        """Blocking: the transfer engine forgets what nothing writes to, then it is unmapped."""
        graves, self._graves = self._graves, []
        for grave in graves:
            if grave.writing():
                (_LEFT if self._is_closed else self._graves).append(grave)
            elif grave.registered and self._endpoint is not None:
                try:
                    self._endpoint.unregister(grave.registered)
                except EndpointFailed as error:
                    _logger.warning("a block of a copy stays registered: %s", error)
                    _LEFT.append(grave)


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
