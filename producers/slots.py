"""The two slots of a rank: which one is written next, and when nobody reads it any more.

Owns the shared-memory blocks, which are registered with the transfer engine if there is one, for as
long as they are there. A slot that held a published version is given out again only after
`CheckpointRetired` was acknowledged, *then* the leases of its readers were listed and are gone. A
reader takes its lease first and looks for the retirement then: whichever way the two meet, the
publisher sees the lease or the reader sees the retirement.

What readers may know of is the announcer's to say, who remembers it: the bus alone could have
forgotten. On ranks other than 0, who announce nothing, it is what they have heard.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from typing import Final

import anyio
import anyio.to_thread

from weightbus.bus.blocks import SHM_PREFIX, SharedBlock, check_room
from weightbus.bus.endpoint import Endpoint, register_block, unregister_block
from weightbus.bus.errors import EndpointFailed
from weightbus.bus.host import host_id
from weightbus.producers.announcing import Announcer
from weightbus.producers.errors import SlotBusy
from weightbus.schemas.checkpoint import CheckpointRetired
from weightbus.schemas.placement import Placement, RemoteSegment, SharedMemorySegment
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES

__all__ = ("Slot", "Slots")

SLOTS = 2
"""The newest version, and one that is being written, or is kept for who was cut short."""

FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.25
"""Between two looks at the leases: each pause is twice the one before, up to this."""


_logger = logging.getLogger(__name__)

_LEFT: Final[list[memoryview]] = []
"""Memory that stays registered, and so stays mapped as long as this process."""


class Slot:
    """One block, or room for one."""

    def __init__(self) -> None:
        self.held: SharedBlock | None = None
        self.version: int | None = None
        """What was written into it, whole; None: nothing."""

    @property
    def block(self) -> SharedBlock:
        """Of a slot that was given out."""
        assert self.held is not None
        return self.held


class Slots:
    """Made once per publisher; `close` it. Without `endpoint` no other host can read them."""

    def __init__(self, announcer: Announcer, rank: int, endpoint: Endpoint | None = None) -> None:
        self._announcer, self._rank, self._endpoint = announcer, rank, endpoint
        self._bus, self._model, self._producer = announcer.bus, announcer.model, announcer.producer
        self._host_id = host_id()
        self._slots = [Slot() for _ in range(SLOTS)]

    @property
    def written(self) -> tuple[int, ...]:
        """The versions in the slots."""
        return tuple(slot.version for slot in self._slots if slot.version is not None)

    def placement(self, slot: Slot) -> Placement:
        """Where readers find the segment of a slot while its present version is whole."""
        name, generation = slot.block.name, slot.block.generation
        local = SharedMemorySegment(name=name, host_id=self._host_id, generation=generation)
        if self._endpoint is None:
            return ((local,),)
        remote = RemoteSegment(
            protocol=self._endpoint.protocol,
            session=self._endpoint.session,
            address=slot.block.address,
            generation=generation,
        )
        return ((local, remote),)

    async def free(self, size_bytes: int, version: int, newest: int, wait_s: float) -> Slot:
        """A slot with a block of `size_bytes` for `version`; nobody reads it any more.

        Never the slot of `newest`, the newest version that was announced; the slot that holds
        `version` itself, if that was tried before.

        Raises:
            SlotBusy: readers held on for `wait_s`. The slot's version is retired, not overwritten.
            SharedMemoryFull: there is no room for a new block; nothing has happened, unless others
                took the room meanwhile: then the slot stays empty.
            SharedMemoryUnavailable: no new block, for another reason; the slot stays empty.
            EndpointFailed: the new block cannot be registered; the slot stays empty.
        """
        slot = min(
            (slot for slot in self._slots if slot.version is None or slot.version != newest),
            key=lambda slot: self._order(slot, version),
        )
        renew = slot.held is None or slot.held.size_bytes != size_bytes
        if renew:
            check_room(SHM_HEADER_BYTES + size_bytes, slot.held.size_bytes if slot.held else 0)
        if slot.version is not None and self._announcer.is_offered(slot.version):
            if slot.version != version:
                await self._retire(slot.version, "its slot is needed for a new version")
            readers = await self._readers_left((slot.version, newest), wait_s)
            if readers:
                raise SlotBusy(slot.version, readers, wait_s)
        slot.version = None
        if renew:
            await anyio.to_thread.run_sync(self._renew, slot, size_bytes)
        return slot

    async def retire_all(self, wait_s: float) -> None:
        """Tell readers that every offered version ends, and wait for them, `wait_s` at most.

        Blocks that are closed under a reader stay his, unchanged; who has not opened them yet
        fails cleanly.
        """
        versions = sorted(filter(self._announcer.is_offered, self.written))
        for version in versions:
            await self._retire(version, "its publisher ends")
        readers = await self._readers_left(versions, wait_s)
        if readers:
            reason = f"its publisher ended, after waiting {wait_s:g} s for its readers"
            await self._retire(versions[-1], reason, active_readers=len(readers))

    def close(self) -> None:
        """Remove the blocks. A read from another host that is still under way fails."""
        for slot in self._slots:
            self._drop(slot)

    def _order(self, slot: Slot, version: int) -> tuple[int, int]:
        """The slot of `version`, then empty ones, never offered ones, and the oldest version."""
        if slot.version is None:
            return (1, 0)
        if slot.version == version:
            return (0, 0)
        return (3 if self._announcer.is_offered(slot.version) else 2, slot.version)

    def _renew(self, slot: Slot, size_bytes: int) -> None:
        """Blocking. The old block goes first, so that /dev/shm never holds three."""
        generation = 0
        if slot.held is not None:
            generation = slot.held.generation + slot.held.generation % 2
            self._drop(slot)
        unique = secrets.token_hex(8)
        name = f"{SHM_PREFIX}{self._model}.{self._producer}.{self._rank}.{unique}"
        block = SharedBlock(name, size_bytes, generation)
        if self._endpoint is not None:
            try:
                register_block(self._endpoint, block)
            except EndpointFailed:
                block.close()
                raise
        slot.held = block

    def _drop(self, slot: Slot) -> None:
        if slot.held is None:
            return
        block, slot.held = slot.held, None
        if self._endpoint is not None:
            try:
                unregister_block(self._endpoint, block)
            except EndpointFailed as error:
                _logger.warning("%s stays registered: %s", block.name, error)
                _LEFT.append(block.data)
        block.close()

    async def _retire(self, version: int, reason: str, active_readers: int = 0) -> None:
        await self._bus.publish(
            CheckpointRetired(
                model=self._model,
                version=version,
                producer=self._producer,
                reason=reason,
                active_readers=active_readers,
            )
        )

    async def _readers_left(self, versions: Sequence[int], wait_s: float) -> list[str]:
        """Wait until nobody reads `versions`; returns who does after `wait_s`."""
        deadline = anyio.current_time() + wait_s
        pause_s = FIRST_PAUSE_S
        while True:
            readers = [
                f"{lease.engine} (version {version})"
                for version in versions
                for lease in await self._bus.reader_leases.readers(self._model, version)
            ]
            left_s = deadline - anyio.current_time()
            if not readers or left_s <= 0:
                return readers
            await anyio.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
