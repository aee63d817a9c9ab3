"""The two slots of a rank: which one is written next, and when nobody reads it any more.

A slot is one block, or one in each of several kinds of memory with the same data; they are made and
owned by `weightbus.producers.memory`. A slot that held a published version is given out again only
after `CheckpointRetired` was acknowledged, *then* the leases of its readers were listed and are
gone. A reader takes its lease first and looks for the retirement then: whichever way the two meet,
the publisher sees the lease or the reader sees the retirement.

What readers may know of is the announcer's to say, who remembers it: the bus alone could have
forgotten. On ranks other than 0, who announce nothing, it is what they have heard.

Where the trainer does not wait for readers (`WhenBusy`), they are looked for before the retirement,
too: a version that is skipped then takes none from anybody, unless another rank of the trainer has
looked before the reader came.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Final, Literal

import anyio
import anyio.to_thread

from weightbus.bus.cuda import CudaBlock
from weightbus.producers.announcing import Announcer
from weightbus.producers.errors import PublisherClosed, SlotBusy, VersionSkipped
from weightbus.producers.memory import Block, Memory
from weightbus.schemas.checkpoint import CheckpointRetired
from weightbus.schemas.leases import ReaderLease
from weightbus.schemas.placement import Placement

__all__ = ("Slot", "Slots", "WhenBusy")

_logger = logging.getLogger(__name__)

WhenBusy = Literal["wait", "skip", "fail"]
"""What a trainer does while engines read what lies in the slots; see `PublisherOptions`."""

SLOTS = 2
"""The newest version, and one that is being written, or is kept for who was cut short."""

FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.25
"""Between two looks at the leases: each pause is twice the one before, up to this."""

WARN_AFTER_S: Final = 1.0
"""A wait for readers that is longer is told, once."""

READERS_NAMED: Final = 8


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

    def __init__(
        self, announcer: Announcer, when_busy: WhenBusy, wait_s: float, *, warns: bool = True
    ) -> None:
        """`wait_s`: for readers, where `when_busy` says that they are waited for. `warns`: a long
        wait is a warning here; all ranks of a trainer wait for the same readers."""
        self._announcer = announcer
        self._when_busy, self._wait_s = when_busy, wait_s
        self._level = logging.WARNING if warns else logging.INFO
        self.waited_s = 0.0
        """For readers, by the `free` that was called last."""
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered while a slot is waited for."""
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

    @property
    def size_bytes(self) -> dict[str, int]:
        """What the slots take of each kind of memory that they lie in."""
        sizes: dict[str, int] = {}
        for slot in self._slots:
            for block in slot.blocks.values():
                memory = "device" if isinstance(block, CudaBlock) else "host"
                sizes[memory] = sizes.get(memory, 0) + block.size_bytes
        return sizes

    async def free(
        self, size_bytes: int, version: int, newest: int, kinds: Sequence[Memory]
    ) -> Slot:
        """A slot with a block of `size_bytes` of each kind for `version`; nobody reads it any more.

        Never the slot of `newest`, the newest version that was announced; the slot that holds
        `version` itself, if that was tried before. It is in use until `done`, also if this raises.

        Raises:
            PublisherClosed: the slots have ended meanwhile; no block was made.
            SlotBusy: readers held on for as long as they are waited for. The slot's version is not
                overwritten; it is retired if they were waited for at all.
            VersionSkipped: there are readers, and the trainer does not wait for them.
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
        self.waited_s = 0.0
        renew = set(slot.blocks) != set(kinds)
        for kind in kinds:
            held = slot.blocks.get(kind)
            if held is None or held.size_bytes != size_bytes:
                await anyio.to_thread.run_sync(kind.check_room, size_bytes, held)
                renew = True
        if slot.version is not None and self._announcer.is_offered(slot.version):
            await self._until_unread(slot.version, newest, version)
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

    async def _until_unread(self, old: int, newest: int, version: int) -> None:
        """Retire what is in a slot; returns when nobody reads it, nor the newest version.

        Raises:
            SlotBusy, VersionSkipped: as `free`.
        """
        if self._when_busy != "wait":
            await self._refuse_readers(old, newest, version)
        if old != version:
            await self._retire(old, "its slot is needed for a new version")
        if self._when_busy != "wait":
            await self._refuse_readers(old, newest, version)
            return
        start_s = anyio.current_time()
        try:
            with self.waiting():
                readers = await self._readers_left((old, newest), self._wait_s, for_version=version)
        finally:
            self.waited_s = anyio.current_time() - start_s
        if readers:
            raise SlotBusy(old, _names(readers), self._wait_s)

    async def _refuse_readers(self, old: int, newest: int, version: int) -> None:
        readers = await self._readers_left((old, newest), wait_s=0.0)
        if readers and self._when_busy == "skip":
            raise VersionSkipped(version, "still read by " + _listed(_names(readers)))
        if readers:
            raise SlotBusy(old, _names(readers), 0.0)

    async def _readers_left(
        self, versions: Sequence[int], wait_s: float, for_version: int | None = None
    ) -> list[ReaderLease]:
        """Wait until nobody reads `versions`; returns who does after `wait_s`.

        A long wait `for_version` is warned about, once.
        """
        start_s = anyio.current_time()
        pause_s = FIRST_PAUSE_S
        while True:
            readers = [
                lease
                for version in versions
                for lease in await self._bus.reader_leases.readers(self._model, version)
            ]
            waited_s = anyio.current_time() - start_s
            if not readers or waited_s >= wait_s:
                return readers
            if for_version is not None and waited_s > WARN_AFTER_S:
                self._warn(for_version, readers, waited_s)
                for_version = None
            await anyio.sleep(min(pause_s, wait_s - waited_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _warn(self, version: int, readers: Sequence[ReaderLease], waited_s: float) -> None:
        now_ns = self._bus.clock.now_ns()
        sizes = self.size_bytes
        _logger.log(
            self._level,
            "version %d of %s has waited %.1f s, of %g s at most, for readers of older versions: "
            "%s; the two slots take %s bytes. The trainer stands still meanwhile: "
            "when_busy='skip' would go on without the version",
            version,
            self._model,
            waited_s,
            self._wait_s,
            _listed([f"{_name(lease)}{_age(lease, now_ns)}" for lease in readers]),
            " + ".join(f"{size:,} {memory}" for memory, size in sizes.items()),
        )


def _name(lease: ReaderLease) -> str:
    return f"{lease.engine} (version {lease.version})"


def _names(leases: Sequence[ReaderLease]) -> list[str]:
    return [_name(lease) for lease in leases]


def _age(lease: ReaderLease, now_ns: int) -> str:
    """By the reader's clock, which need not be ours."""
    if not 0 < lease.taken_ns <= now_ns:
        return ""
    return f" for {(now_ns - lease.taken_ns) / 1e9:.1f} s"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - READERS_NAMED
    return ", ".join(names[:READERS_NAMED]) + (f" and {more} more" if more > 0 else "")


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
