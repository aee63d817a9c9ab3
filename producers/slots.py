"""The two slots of a rank: which one is written next, and when nobody reads it any more.

A slot is one block, or one in each of several kinds of memory with the same data; they are made and
owned by `weightbus.producers.memory`. A slot that held a published version is given out again only
after `CheckpointRetired` was acknowledged, *then* the leases of its readers were listed and are
gone. A reader takes its lease first and looks for the retirement then: whichever way the two meet,
the publisher sees the lease or the reader sees the retirement.

What readers may know of is the announcer's to say, who remembers it: the bus alone could have
forgotten. On ranks other than 0, who announce nothing, it is what they have heard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import anyio
import anyio.to_thread

from weightbus.producers.announcing import Announcer
from weightbus.producers.errors import PublisherClosed, SlotBusy
from weightbus.producers.memory import Block, Memory
from weightbus.schemas.checkpoint import CheckpointRetired
from weightbus.schemas.placement import Placement

__all__ = ("Slot", "Slots")

SLOTS = 2
"""The newest version, and one that is being written, or is kept for who was cut short."""

FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.25
"""Between two looks at the leases: each pause is twice the one before, up to this."""


class Slot:
    """Blocks of one size, or room for them."""

    def __init__(self) -> None:
        self.blocks: dict[Memory, Block] = {}
        """The nearest to readers first."""
        self.version: int | None = None
        """What was written into it, whole; None: nothing."""

    def leave(self) -> None:
        """A device may write to the blocks still: they stay as they are, and others are made."""
        for kind, block in self.blocks.items():
            kind.leave(block)
        self.blocks = {}


class Slots:
    """Made once per publisher; `end` it. One slot is written at a time."""

    def __init__(self, announcer: Announcer) -> None:
        self._announcer = announcer
        self._bus, self._model, self._producer = announcer.bus, announcer.model, announcer.producer
        self._slots = [Slot() for _ in range(SLOTS)]
        self._readers_gone = False
        self._in_use: Slot | None = None
        self._ended = False

    @property
    def has_ended(self) -> bool:
        return self._ended

    @property
    def written(self) -> tuple[int, ...]:
        """The versions in the slots."""
        return tuple(slot.version for slot in self._slots if slot.version is not None)

    def placement(self, slot: Slot) -> Placement:
        """Where readers find the segment of a slot while its present version is whole."""
        return (tuple(way for kind, block in slot.blocks.items() for way in kind.ways(block)),)

    async def free(
        self, size_bytes: int, version: int, newest: int, wait_s: float, kinds: Sequence[Memory]
    ) -> Slot:
        """A slot with a block of `size_bytes` of each kind for `version`; nobody reads it any more.

        Never the slot of `newest`, the newest version that was announced; the slot that holds
        `version` itself, if that was tried before. It is in use until `done`, also if this raises.

        Raises:
            PublisherClosed: the slots have ended meanwhile; no block was made.
            SlotBusy: readers held on for `wait_s`. The slot's version is retired, not overwritten.
            SharedMemoryFull, DeviceMemoryFull: there is no room for a new block; nothing has
                happened, unless others took the room meanwhile: then the slot stays empty.
            SharedMemoryUnavailable, EndpointFailed, CudaFailed: no new block, for another reason;
                the slot stays empty.
        """
        slot = min(
            (slot for slot in self._slots if slot.version is None or slot.version != newest),
            key=lambda slot: self._order(slot, version),
        )
        self._in_use = slot
        renew = set(slot.blocks) != set(kinds)
        for kind in kinds:
            held = slot.blocks.get(kind)
            if held is None or held.size_bytes != size_bytes:
                await anyio.to_thread.run_sync(kind.check_room, size_bytes, held)
                renew = True
        if slot.version is not None and self._announcer.is_offered(slot.version):
            if slot.version != version:
                await self._retire(slot.version, "its slot is needed for a new version")
            readers = await self._readers_left((slot.version, newest), wait_s)
            if readers:
                raise SlotBusy(slot.version, readers, wait_s)
        if self._ended:
            raise PublisherClosed(self._model)
        slot.version = None
        if renew:
            await anyio.to_thread.run_sync(_renew, slot, size_bytes, kinds)
        return slot

    def done(self) -> None:
        """No slot is written now."""
        self._in_use = None

    async def retire_all(self, wait_s: float) -> None:
        """Tell readers that every offered version ends, and wait for them, `wait_s` at most.

        Blocks that are closed under a reader stay his, unchanged; who has not opened them yet
        fails cleanly. Of GPU memory see `DeviceMemory`.
        """
        versions = sorted(filter(self._announcer.is_offered, self.written))
        for version in versions:
            await self._retire(version, "its publisher ends")
        readers = await self._readers_left(versions, wait_s)
        if readers:
            reason = f"its publisher ended, after waiting {wait_s:g} s for its readers"
            await self._retire(versions[-1], reason, active_readers=len(readers))
        self._readers_gone = not readers

    def end(self) -> Callable[[], None]:
        """Give out no slot any more. Returns what removes the blocks: blocking, idempotent.

        A slot that is in use is left out: `end` again when it is `done`.
        """
        self._ended = True
        idle = [slot for slot in self._slots if slot is not self._in_use]
        self._slots = [slot for slot in self._slots if slot is self._in_use]
        offered = [
            slot.version is not None and self._announcer.is_offered(slot.version) for slot in idle
        ]
        may_be_read = [each and not self._readers_gone for each in offered]
        return partial(_drop_all, list(zip(idle, may_be_read, strict=True)))

    def _order(self, slot: Slot, version: int) -> tuple[int, int]:
        """The slot of `version`, then empty ones, never offered ones, and the oldest version."""
        if slot.version is None:
            return (1, 0)
        if slot.version == version:
            return (0, 0)
        return (3 if self._announcer.is_offered(slot.version) else 2, slot.version)

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


def _renew(slot: Slot, size_bytes: int, kinds: Sequence[Memory]) -> None:
    """Blocking. Old blocks go first, so that no memory ever holds three."""
    generation = max((block.generation for block in slot.blocks.values()), default=0)
    generation += generation % 2
    kept = {}
    for kind, block in slot.blocks.items():
        if kind in kinds and block.size_bytes == size_bytes:
            kept[kind] = block
        else:
            kind.give_up(block, may_be_read=False)
    slot.blocks = kept
    try:
        for kind in kinds:
            if kind not in kept:
                kept[kind] = kind.make(size_bytes, generation)
    except BaseException:
        _drop(slot, may_be_read=False)
        raise
    slot.blocks = {kind: kept[kind] for kind in kinds}


def _drop(slot: Slot, *, may_be_read: bool) -> None:
    for kind in tuple(slot.blocks):
        kind.give_up(slot.blocks[kind], may_be_read=may_be_read)
        del slot.blocks[kind]


def _drop_all(slots: Sequence[tuple[Slot, bool]]) -> None:
    for slot, may_be_read in slots:
        _drop(slot, may_be_read=may_be_read)
