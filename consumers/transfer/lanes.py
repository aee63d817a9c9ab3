"""The reader's side of staging blocks: shared memory that a consumer fills slot by slot.

Owns the mappings and descriptors of the blocks that one worker reads. The owner of a block counts
in its words what it has filled, this reader what it has done with; the words and who writes which
are listed in `weightbus.schemas.shared_memory`.

Invariants:
    A block is read through one mapping as long as it is the file of its name, however many
    transfers go through it, and is registered once with the worker's GPU, if it has one; words of
    another turn say nothing.
    Bytes of a slot are only looked at between the owner's word and our own.
    Every wait has a deadline, and ends early when the owner gives up or is gone. The owner holds an
    exclusive lock on the file for as long as it lives: whoever gets a shared one knows. The lock is
    only tried, and given back at once.

Memory order: words are aligned 8-byte loads and stores, and x86-64 keeps stores in order (see
`weightbus.bus.blocks`). Blocking: runs in workers.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from weightbus.bus.cuda import open_cuda
from weightbus.consumers.errors import SegmentUnavailable
from weightbus.consumers.transfer.gpu import Gpu, OpenCuda, gpu_of
from weightbus.consumers.transfer.opening import (
    file_identity,
    is_orphan,
    open_own_block,
    read_header,
    too_short,
)
from weightbus.consumers.transfer.segments import KEPT_OPENINGS
from weightbus.schemas.shared_memory import (
    SHM_FILLED_OFFSET,
    SHM_GIVEN_UP_OFFSET,
    SHM_HEADER_BYTES,
    SHM_READERS_OFFSET,
    TURN_BITS,
)
from weightbus.schemas.worker import Stream

__all__ = (
    "Budget",
    "Lanes",
    "StagingBlock",
    "StagingCache",
    "leave_lanes",
    "readers_done",
    "wait_for",
)

OWNER_CHECK_S: Final = 0.25
"""How often somebody who waits looks whether the owners live."""

ORPHAN_S: Final = 1.0
"""A block whose owner is gone may be one that its next owner is about to replace: for so long."""

_FIRST_PAUSE_S: Final = 20e-6
_LONGEST_PAUSE_S: Final = 1e-3

_COUNT_MASK: Final = (1 << TURN_BITS) - 1


class Budget(Protocol):
    """What a wait may take."""

    def check(self) -> None:
        """Raises `DeadlineExceeded` if it is used up."""


class StagingBlock:
    """One mapped block. Not for several threads."""

    def __init__(self, name: str, fd: int) -> None:
        """Takes the descriptor. Raises OSError if the block cannot be mapped."""
        status = os.fstat(fd)
        self.name = name
        self.identity = file_identity(status)
        self.used = 0
        """Number of the transfer that opened it last."""
        self._map = mmap.mmap(fd, status.st_size)
        self._fd = fd
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._words = self._bytes[:SHM_HEADER_BYTES].view("<u8")
        self.address = int(self._bytes.ctypes.data) + SHM_HEADER_BYTES
        """Of the first slot's first byte."""
        self._gpu: Gpu | None = None

    @property
    def data(self) -> memoryview:
        """All slots. Drop it before `close`."""
        return self._bytes.data[SHM_HEADER_BYTES:]

    @property
    def size_bytes(self) -> int:
        """Of all slots."""
        return self._bytes.nbytes - SHM_HEADER_BYTES

    def header_bytes(self, offset_bytes: int, size_bytes: int) -> bytes:
        """A copy of what lies in the header page."""
        assert offset_bytes + size_bytes <= SHM_HEADER_BYTES
        return bytes(self._bytes[offset_bytes : offset_bytes + size_bytes])

    def put_header(self, offset_bytes: int, value: bytes) -> None:
        assert offset_bytes + len(value) <= SHM_HEADER_BYTES
        self._bytes[offset_bytes : offset_bytes + len(value)] = np.frombuffer(value, np.uint8)

    def map_header(self) -> mmap.mmap:
        """The header page, mapped once more: the caller's to close, be it after the block is."""
        return mmap.mmap(self._fd, SHM_HEADER_BYTES)

    def count(self, offset_bytes: int, turn: int) -> int:
        """What a word says in a turn; -1: nothing."""
        word = self.word(offset_bytes)
        return word & _COUNT_MASK if word >> TURN_BITS == turn else -1

    def set_count(self, offset_bytes: int, turn: int, count: int) -> None:
        self.set_word(offset_bytes, turn << TURN_BITS | count)

    def least_done(self, readers: int, turn: int) -> int:
        """How many buckets all of the first `readers` have done with; -1: one has not begun."""
        return int(readers_done(self._words, readers, turn).min(initial=_COUNT_MASK))

    def word(self, offset_bytes: int) -> int:
        """A word of the header page."""
        return int(self._words[offset_bytes // 8])

    def set_word(self, offset_bytes: int, value: int) -> None:
        self._words[offset_bytes // 8] = value

    def filled(self, turn: int) -> int:
        """How much the owner says it has filled in this turn.

        Raises:
            SegmentUnavailable: it has given the turn up.
        """
        if self.word(SHM_GIVEN_UP_OFFSET) == turn:
            raise SegmentUnavailable(
                self.name, "given up by its owner", "must be filled to the end"
            )
        word = self.word(SHM_FILLED_OFFSET)
        return word & _COUNT_MASK if word >> TURN_BITS == turn else 0

    def check_owner(self) -> None:
        """
        Raises:
            SegmentUnavailable: the owner is gone.
        """
        if self.is_orphan():
            raise SegmentUnavailable(self.name, "without its owner", "must be filled to the end")

    def is_orphan(self) -> bool:
        """Whether the owner is gone."""
        return is_orphan(self._fd)

    @property
    def is_registered(self) -> bool:
        return self._gpu is not None

    def register(self, gpu: Gpu) -> None:
        """Let a GPU read all of it at its addresses here, until `close`.

        Raises:
            SegmentUnavailable: the device does not take it.
        """
        base = self.address - SHM_HEADER_BYTES
        gpu.register(self.name, base, self._bytes.nbytes, read_only=False)
        self._gpu = gpu

    def close(self) -> None:
        """Unmap it. Nothing may look at its addresses any more, on no device either."""
        if self._gpu is not None:
            base = self.address - SHM_HEADER_BYTES
            if not self._gpu.unregister(self.name, base, self._map):
                os.close(self._fd)
                return
        del self._bytes, self._words
        self._map.close()
        os.close(self._fd)


class StagingCache:
    """The staging blocks that one worker reads, by name. Not for several threads.

    Args:
        device: of the worker's parameters: `cpu`, `cuda:0`, ... Blocks are registered with a GPU.
        cuda: asked for when the GPU first needs it.
    """

    def __init__(self, device: str = "cpu", cuda: OpenCuda = open_cuda) -> None:
        self._gpu = gpu_of(device, cuda)
        self._blocks: dict[str, StagingBlock] = {}
        self._transfer = 0

    @contextmanager
    def open_all(
        self,
        names: Sequence[str],
        size_bytes: int,
        turn: int,
        budget: Budget,
        *,
        is_read: bool = True,
    ) -> Iterator[tuple[StagingBlock, ...]]:
        """Wait until all blocks are there, and map them; mappings are kept for the next transfer.

        Args:
            size_bytes: what every block holds at least.
            is_read: False: only their words are wanted; what a GPU is to read is registered by
                `register`.

        Raises:
            SegmentUnavailable: one is not as it should be, or its owner is gone, or has given up.
            DeadlineExceeded: one is missing still.
        """
        self._transfer += 1
        opened: list[StagingBlock] = []
        since = time.monotonic()

        def is_open() -> bool:
            for block in opened:
                block.filled(turn)
            while len(opened) < len(names):
                may_wait = time.monotonic() < since + ORPHAN_S
                found = self._opened(names[len(opened)], size_bytes, orphan_may_go=may_wait)
                if found is None:
                    return False
                if is_read:
                    self._register_or_close(found)
                opened.append(found)
            return True

        try:
            wait_for(is_open, opened, budget)
            yield tuple(opened)
        finally:
            self._close_unused()

    def close(self) -> None:
        """Unmap everything."""
        for block in self._blocks.values():
            block.close()
        self._blocks.clear()

    def _opened(self, name: str, size_bytes: int, *, orphan_may_go: bool) -> StagingBlock | None:
        """The block of a name; None: it is not ready yet."""
        try:
            fd = open_own_block(name, os.O_RDWR)
        except SegmentUnavailable as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        kept = self._blocks.get(name)
        try:
            if not _is_ready(name, fd, size_bytes):
                return None
            if is_orphan(fd):
                if orphan_may_go:
                    return None
                raise SegmentUnavailable(name, "without its owner", "must be filled by it")
            if kept is not None and kept.identity != file_identity(os.fstat(fd)):
                self._blocks.pop(name).close()
                kept = None
            if kept is None:
                kept, fd = StagingBlock(name, fd), -1
                self._blocks[name] = kept
        except OSError as error:
            raise SegmentUnavailable(name, error.strerror, "must be mapped") from error
        finally:
            if fd >= 0:
                os.close(fd)
        kept.used = self._transfer
        return kept

    def register(self, block: StagingBlock) -> None:
        """Let the worker's GPU, if it has one, read an open block; once.

        Raises:
            SegmentUnavailable: the device does not take it.
        """
        if self._gpu is not None and not block.is_registered:
            block.register(self._gpu)

    def _register_or_close(self, block: StagingBlock) -> None:
        try:
            self.register(block)
        except SegmentUnavailable:
            self._blocks.pop(block.name).close()
            raise

    def _close_unused(self) -> None:
        for name, block in list(self._blocks.items()):
            if block.used <= self._transfer - KEPT_OPENINGS:
                self._blocks.pop(name).close()


class Lanes:
    """One transfer through the lanes of a host, as one reader sees it. From now on the owners count
    on this reader: what takes long is done before."""

    def __init__(self, blocks: Sequence[StagingBlock], feed: Stream, budget: Budget) -> None:
        self._blocks, self._budget = tuple(blocks), budget
        self._turn, self._slots, self.bucket_bytes = feed.turn, feed.slots, feed.bucket_bytes
        self._word = SHM_READERS_OFFSET + 8 * feed.reader
        self._set_done(0)

    def __len__(self) -> int:
        return len(self._blocks)

    def address(self, bucket: int, lane: int) -> int:
        """Where the part of a bucket lies that goes through a lane."""
        return self._blocks[lane].address + bucket % self._slots * self.bucket_bytes

    def wait_filled(self, bucket: int) -> None:
        """Return when a bucket can be read in every lane. Until `done` it stays there.

        Raises:
            SegmentUnavailable: an owner has given up, or is gone.
            DeadlineExceeded
        """
        wait_for(
            lambda: min([block.filled(self._turn) for block in self._blocks]) > bucket,
            self._blocks,
            self._budget,
        )

    def done(self, bucket: int) -> None:
        """A bucket has been read: its slots may be filled again.

        Raises:
            SegmentUnavailable: an owner gave up meanwhile: what was read may have been anything.
        """
        for block in self._blocks:
            if block.filled(self._turn) <= bucket:
                found = f"on turn {block.word(SHM_FILLED_OFFSET) >> TURN_BITS}"
                raise SegmentUnavailable(block.name, found, f"must stay on turn {self._turn}")
        self._set_done(bucket + 1)

    def _set_done(self, buckets: int) -> None:
        for block in self._blocks:
            block.set_word(self._word, self._turn << TURN_BITS | buckets)


def leave_lanes(blocks: Sequence[StagingBlock], feed: Stream) -> None:
    """Nothing more is read there, or nothing at all: nobody waits for this reader any more."""
    for block in blocks:
        block.set_word(SHM_READERS_OFFSET + 8 * feed.reader, feed.turn << TURN_BITS | _COUNT_MASK)


def readers_done(words: npt.NDArray[np.uint64], readers: int, turn: int) -> npt.NDArray[np.int64]:
    """[readers] How many buckets each has done with in a turn; -1: it has not begun.

    Args:
        words: of the header page.
    """
    first = SHM_READERS_OFFSET // 8
    own = words[first : first + readers].copy()
    counts = (own & np.uint64(_COUNT_MASK)).astype(np.int64)
    return np.where(own >> np.uint64(TURN_BITS) == turn, counts, -1)


def wait_for(
    condition: Callable[[], bool],
    blocks: Sequence[StagingBlock],
    budget: Budget,
    *,
    eager_s: float = 0.0,
) -> None:
    """Return when a condition holds that the blocks' owners bring about.

    Args:
        eager_s: so long it is looked at again at once.

    Raises:
        SegmentUnavailable: an owner is gone; and what the condition raises.
        DeadlineExceeded
    """
    pause_s = _FIRST_PAUSE_S
    since = time.monotonic()
    next_check = since + OWNER_CHECK_S
    while not condition():
        budget.check()
        now = time.monotonic()
        if now >= next_check:
            for block in blocks:
                block.check_owner()
            next_check = now + OWNER_CHECK_S
        time.sleep(pause_s)
        if now >= since + eager_s:
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _is_ready(name: str, fd: int, size_bytes: int) -> bool:
    """Whether a block has been made to its end: its header is written last.

    Raises:
        SegmentUnavailable: it is no block, or smaller than it must be.
    """
    header = os.pread(fd, SHM_HEADER_BYTES, 0)
    if len(header) < SHM_HEADER_BYTES or not any(header[:8]):
        return False
    promised, _ = read_header(name, header)
    found = min(promised, os.fstat(fd).st_size - SHM_HEADER_BYTES)
    if found < size_bytes:
        raise too_short(name, found, size_bytes)
    return True
