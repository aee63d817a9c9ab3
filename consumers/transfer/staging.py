"""The owner's side of staging: blocks of shared memory that this consumer fills, slot by slot.

Owns the blocks, from version to version, and those that a thread may still write to although the
transfer has ended. The words of a block and who writes which are listed in
`weightbus.schemas.shared_memory`; the readers' side is `weightbus.consumers.transfer.lanes`.

Invariants: a block that was the target of a transfer that failed is never filled again; its memory
stays until nothing writes to it; all blocks together, those included, stay within the bound.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from weightbus.bus.blocks import SHM_DIRECTORY, STAGE_PREFIX, SharedBlock
from weightbus.bus.errors import EndpointFailed, SharedMemoryFull, SharedMemoryUnavailable
from weightbus.schemas.shared_memory import (
    MAX_READERS,
    SHM_ADMITTED_OFFSET,
    SHM_FETCHED_OFFSET,
    SHM_FILLED_OFFSET,
    SHM_GIVEN_UP_OFFSET,
    SHM_HEADER_BYTES,
    SHM_READERS_OFFSET,
    SHM_REQUEST_OFFSET,
    SHM_STAGED_OFFSET,
    SHM_WANTED_OFFSET,
    TURN_BITS,
)

__all__ = ("BlockPool", "BlockSpec", "Request", "StagingBlock")

_logger = logging.getLogger(__name__)

KEPT_VERSIONS: Final = 2
"""Blocks that so many versions did not use are closed."""

FREE_SHARE: Final = 0.5
"""Of the free shared memory, staging takes so much where nothing else is said."""

_COUNT_MASK: Final = (1 << TURN_BITS) - 1


class BlockSpec(NamedTuple):
    """What a staging block shall be."""

    name: str
    """Below /dev/shm."""
    slots: int
    slot_bytes: int

    @property
    def size_bytes(self) -> int:
        """Of the whole block, its header included."""
        return self.slots * self.slot_bytes + SHM_HEADER_BYTES


class Request(NamedTuple):
    """What a reader asks for (`Relay`)."""

    number: int
    """Of the request; counts from 1 in every turn."""
    segment: int
    window: int
    slot: int


class StagingBlock:
    """One block, as its owner has it. For one event loop."""

    name: str
    slots: int
    slot_bytes: int

    def __init__(self, spec: BlockSpec, directory: Path = SHM_DIRECTORY) -> None:
        """Blocking: allocates the memory.

        Raises:
            SharedMemoryFull, SharedMemoryUnavailable: it cannot be made.
        """
        self.name, self.slots, self.slot_bytes = spec
        self.size_bytes = self.slots * self.slot_bytes
        self._block = SharedBlock(self.name, self.size_bytes, 0, directory)
        self._words = self._block.words(0, SHM_HEADER_BYTES // 8)
        self._memory = self._block.data
        self._address = self._block.address
        self._turn = 0

    @property
    def address(self) -> int:
        """Of the first slot's first byte, in this process."""
        return self._address

    def slot_address(self, slot: int) -> int:
        """Of a slot's first byte, in this process."""
        return self._address + slot * self.slot_bytes

    def slot(self, slot: int) -> memoryview:
        """The bytes of a slot; keeps the memory mapped."""
        return self._memory[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def begin(self, turn: int) -> None:
        """A new transfer; what readers say of other turns counts for nothing."""
        assert 0 < turn <= _COUNT_MASK
        self._turn = turn
        self._words[SHM_GIVEN_UP_OFFSET // 8] = 0
        self._words[SHM_FETCHED_OFFSET // 8] = 0
        for offset_bytes in (SHM_FILLED_OFFSET, SHM_STAGED_OFFSET, SHM_ADMITTED_OFFSET):
            self._words[offset_bytes // 8] = turn << TURN_BITS

    def filled(self, count: int) -> None:
        """The first `count` buckets are there (`Stream`), or request `count` is answered."""
        self._words[SHM_FILLED_OFFSET // 8] = self._turn << TURN_BITS | count

    def staged(self, count: int) -> None:
        """Device lanes: what the filler does not read itself of the first `count` buckets lies in
        the slots here."""
        self._words[SHM_STAGED_OFFSET // 8] = self._turn << TURN_BITS | count

    def admitted(self, count: int) -> None:
        """Device lanes: every member of the group is ready for the first `count` buckets."""
        self._words[SHM_ADMITTED_OFFSET // 8] = self._turn << TURN_BITS | count

    def filler_fetched(self) -> int:
        """Device lanes: for so many buckets the filler has room, and what its host is the root of;
        -1: it has not begun."""
        return self._count(SHM_FETCHED_OFFSET)

    def filler_filled(self) -> int:
        """Device lanes: so many buckets the filler says can be read."""
        return max(0, self._count(SHM_FILLED_OFFSET))

    def give_up(self) -> None:
        """Nothing more comes in this turn: readers raise at once."""
        self._words[SHM_GIVEN_UP_OFFSET // 8] = self._turn

    def done(self, reader: int) -> int:
        """How many buckets of this turn a reader has done with; -1: it has not begun."""
        assert 0 <= reader < MAX_READERS
        return self._count(SHM_READERS_OFFSET + 8 * reader)

    def request(self, after: int) -> Request | None:
        """The request that follows number `after`, if the reader has made it."""
        word = self._words[SHM_WANTED_OFFSET // 8]
        number = word & _COUNT_MASK
        if word >> TURN_BITS != self._turn or number <= after:
            return None
        first = SHM_REQUEST_OFFSET // 8
        segment, window, slot = self._words[first : first + 3]
        return Request(number, segment, window, slot)

    def _count(self, offset_bytes: int) -> int:
        """What a word of others says in this turn; -1: nothing."""
        word = self._words[offset_bytes // 8]
        return word & _COUNT_MASK if word >> TURN_BITS == self._turn else -1

    def close(self) -> None:
        """Remove the name and the lock: readers see that the owner has left it. Idempotent.

        The memory stays mapped as long as this object lives.
        """
        self._block.close()


class Registry(Protocol):
    """Where memory must be known before reads can go to it: a transfer engine."""

    def register(self, address: int, size_bytes: int) -> None:
        """Blocking. Raises EndpointFailed."""

    def unregister(self, address: int) -> None:
        """Blocking. Raises EndpointFailed."""


class _Grave(NamedTuple):
    block: StagingBlock
    writing: Callable[[], bool]
    registry: Registry | None = None
    """It still knows the block, and has to forget it before it is unmapped."""


_LEFT: Final[list[_Grave]] = []
"""Graves that their pool could not wait for: their memory stays as long as this process."""


class BlockPool:
    """The staging blocks of one consumer. For one event loop; `take` is called in threads.

    Args:
        owner: what names of blocks begin with after the prefix, such as model and engine.
        max_bytes: most memory of all blocks together; 0: a share of what is free.
    """

    def __init__(self, owner: str, max_bytes: int = 0, directory: Path = SHM_DIRECTORY) -> None:
        self._prefix = f"{STAGE_PREFIX}{owner}.{uuid.uuid4().hex[:8]}"
        self._max_bytes, self._directory = max_bytes, directory
        self._lock = threading.Lock()
        self._free: dict[str, StagingBlock] = {}
        self._used: dict[str, int] = {}
        """Name -> version count at its last use."""
        self._taken: dict[str, StagingBlock] = {}
        self._graves: list[_Grave] = []
        self._versions = 0
        self._turn = 0
        self._room_bytes = max_bytes
        """As it was seen last."""
        self._registry: Registry | None = None
        self._registered: dict[str, Registry] = {}
        """Name of a block -> who knows it."""

    def register_with(self, registry: Registry) -> None:
        """Every block that is made from now on is known there, as long as it is there itself."""
        self._registry = registry

    @property
    def total_bytes(self) -> int:
        """Of all blocks that are there: in use, kept for later, or still written to."""
        with self._lock:
            self._reap()
            return self._total_bytes()

    @property
    def room_bytes(self) -> int:
        """What could be taken now, if the blocks that are kept for later were given up. While
        blocks are being made, which takes long: what it was before."""
        if self._lock.acquire(blocking=False):
            try:
                self._reap()
                self._room_bytes = self._room()
            finally:
                self._lock.release()
        return self._room_bytes

    def name_of(self, part: str) -> str:
        """A name that no other process takes."""
        return f"{self._prefix}.{part}"

    def next_turn(self) -> int:
        """For blocks that only this pool names: never the same twice in a row."""
        self._turn = self._turn % _COUNT_MASK + 1
        return self._turn

    def take(self, specs: Sequence[BlockSpec]) -> tuple[StagingBlock, ...]:
        """Blocks that nobody else uses until `give_back` or `condemn`. Blocking.

        Raises:
            SharedMemoryFull, SharedMemoryUnavailable: one cannot be made; none is taken.
        """
        with self._lock:
            self._forget()
            self._reap()
            names = [spec.name for spec in specs]
            assert len(set(names)) == len(names)
            assert not self._taken.keys() & set(names), "one transfer at a time has a block"
            try:
                for spec in specs:
                    self._taken[spec.name] = self._take(spec)
            except BaseException:
                for name in self._taken.keys() & set(names):
                    self._free[name] = self._taken.pop(name)
                raise
            return tuple(self._taken[name] for name in names)

    def give_back(self, blocks: Sequence[StagingBlock]) -> None:
        """They are whole, and nobody writes to them; the next transfer may take them."""
        with self._lock:
            self._versions += 1
            for block in self._still_taken(blocks):
                self._free[block.name] = self._taken.pop(block.name)
                self._used[block.name] = self._versions
            oldest = self._versions - KEPT_VERSIONS
            for name in [name for name in self._free if self._used[name] <= oldest]:
                self._close_kept(name)
            self._reap()

    def condemn(self, blocks: Sequence[StagingBlock], writing: Callable[[], bool]) -> None:
        """Their transfer failed: give them up and never use them again.

        Args:
            writing: whether something may still write to one of them.
        """
        with self._lock:
            for block in self._still_taken(blocks):
                block.give_up()
                block.close()
                self._bury(self._taken.pop(block.name), writing)
            self._reap()

    def close(self) -> None:
        """Remove every block. What is written to keeps its memory; of a transfer that has not
        ended nobody can say that it does not write."""
        for name in list(self._free):
            self._close_kept(name)
        self.condemn(list(self._taken.values()), lambda: True)
        self._forget()
        self._reap()
        _LEFT.extend(self._graves)
        self._graves.clear()

    def _take(self, spec: BlockSpec) -> StagingBlock:
        kept = self._free.get(spec.name)
        if kept is not None and (kept.slots, kept.slot_bytes) == (spec.slots, spec.slot_bytes):
            return self._free.pop(spec.name)
        if kept is not None:
            self._close_kept(spec.name)
            self._forget()
            self._reap()
        need_bytes = spec.size_bytes
        for name in sorted(self._free, key=self._used.__getitem__):
            if self._total_bytes() + need_bytes <= self._limit_bytes():
                break
            self._close_kept(name)
            self._forget()
            self._reap()
        have_bytes = self._limit_bytes() - self._total_bytes()
        if need_bytes > have_bytes:
            raise SharedMemoryFull(str(self._directory), need_bytes, have_bytes)
        block = StagingBlock(spec, self._directory)
        if self._registry is not None and block.size_bytes:
            try:
                self._registry.register(block.address, block.size_bytes)
            except EndpointFailed as error:
                block.close()
                raise SharedMemoryUnavailable(block.name, str(error)) from error
            self._registered[block.name] = self._registry
        self._used[spec.name] = self._versions
        return block

    def _room(self) -> int:
        idle = [grave.block for grave in self._graves if not grave.writing()]
        kept = sum(block.size_bytes + SHM_HEADER_BYTES for block in (*self._free.values(), *idle))
        return max(0, self._limit_bytes() - self._total_bytes() + kept)

    def _all(self) -> list[StagingBlock]:
        graves = (grave.block for grave in self._graves)
        return [*self._free.values(), *self._taken.values(), *graves]

    def _still_taken(self, blocks: Sequence[StagingBlock]) -> list[StagingBlock]:
        """Those that were not removed when the pool was closed."""
        return [block for block in blocks if self._taken.get(block.name) is block]

    def _total_bytes(self) -> int:
        return sum(block.size_bytes + SHM_HEADER_BYTES for block in self._all())

    def _limit_bytes(self) -> int:
        if self._max_bytes:
            return self._max_bytes
        room = os.statvfs(self._directory)
        return int(FREE_SHARE * (room.f_bavail * room.f_frsize + self._total_bytes()))

    def _close_kept(self, name: str) -> None:
        block = self._free.pop(name)
        del self._used[name]
        block.close()
        if name in self._registered:
            self._bury(block, lambda: False)

    def _bury(self, block: StagingBlock, writing: Callable[[], bool]) -> None:
        self._graves.append(_Grave(block, writing, self._registered.pop(block.name, None)))

    def _forget(self) -> None:
        """Blocking: what nothing writes to is not registered any more."""
        for number, grave in enumerate(self._graves):
            if grave.registry is not None and not grave.writing():
                try:
                    grave.registry.unregister(grave.block.address)
                except EndpointFailed as error:
                    _logger.warning("%s stays registered: %s", grave.block.name, error)
                    _LEFT.append(grave)
                self._graves[number] = grave._replace(registry=None)

    def _reap(self) -> None:
        self._graves = [
            grave for grave in self._graves if grave.registry is not None or grave.writing()
        ]
