"""The memory of device lanes, as one worker has it: slots of its own, and those of its peers.

Owns the slots in this worker's GPU that other workers of the host read, and the handles of theirs
that are open here. Allocating, exporting and opening take long, so all are kept from version to
version: slots by their lane's block and size, handles as long as their owner says no other.

Invariants:
    A block holds the handle of the slots that its turn goes through before the turn is announced.
    Slots are freed only when nobody reads them any more. They are given to another lane only then,
    or when whoever may still read them is told that what he read may have been anything.
    A handle is opened again when its owner has written one anew, be it the same: what it names may
    be another allocation by now.

Blocking: runs in workers. Not for several threads at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from weightbus.bus.cuda import CUDA_ALIGNMENT_BYTES, CUDA_HANDLE_BYTES, CudaRuntime
from weightbus.bus.errors import CudaFailed
from weightbus.consumers.errors import SegmentUnavailable
from weightbus.consumers.transfer.lanes import StagingBlock, readers_done
from weightbus.schemas.shared_memory import (
    SHM_GIVEN_UP_OFFSET,
    SHM_HANDLE_OFFSET,
    SHM_HANDLE_SET_OFFSET,
)

__all__ = ("KEPT_OPENINGS", "DeviceSlots", "LaneSlots")

KEPT_OPENINGS: Final = 4
"""Slots and handles that so many openings did not use are let go of: an update opens twice, once to
prepare."""

_logger = logging.getLogger(__name__)


class _Readers:
    """Who reads slots in one turn, as the words of their block tell; outlives the block."""

    def __init__(self, block: StagingBlock, turn: int, readers: int, buckets: int) -> None:
        self.identity = block.identity
        self._map = block.map_header()
        self._words = np.frombuffer(self._map, dtype="<u8")
        self._turn, self._readers, self._buckets = turn, readers, buckets

    @property
    def are_done(self) -> bool:
        """Whether nobody reads the slots any more: who has not begun when the turn is given up does
        not begin."""
        counts = readers_done(self._words, self._readers, self._turn)
        if int(self._words[SHM_GIVEN_UP_OFFSET // 8]) == self._turn:
            counts = counts[counts >= 0]
        return bool((counts >= self._buckets).all())

    def give_up(self) -> None:
        """Whoever reads still shall fail: what he reads is overwritten."""
        self._words[SHM_GIVEN_UP_OFFSET // 8] = self._turn

    def close(self) -> None:
        del self._words
        self._map.close()


@dataclass(eq=False)
class LaneSlots:
    """Slots of this worker's GPU, for one lane at a time."""

    address: int
    """Of the first slot's first byte."""
    size_bytes: int
    """Of all slots, as they were asked for."""
    handle: bytes
    block: str
    """Name of the lane's block."""
    used: int = 0
    """Number of the opening that took them last."""
    named: object = None
    """The file whose header holds the handle."""
    _readers: _Readers | None = None
    """Of the latest turn; None: nobody has been told of these slots, or all have done with them."""

    @property
    def is_read(self) -> bool:
        """Whether somebody may read them."""
        if self._readers is not None and self._readers.are_done:
            self.forget()
        return self._readers is not None

    def name_in(self, block: StagingBlock) -> None:
        """Write the handle into the lane's block, unless it is there."""
        if self.named != block.identity:
            block.put_header(SHM_HANDLE_OFFSET, self.handle)
            block.set_word(SHM_HANDLE_SET_OFFSET, block.word(SHM_HANDLE_SET_OFFSET) + 1)
            self.named = block.identity

    def begin(self, block: StagingBlock, turn: int, readers: int, buckets: int) -> None:
        """They are about to be filled. The owner of the lane has seen to it that all have done with
        its earlier turns; who reads for another lane still, one that has failed, is told."""
        if self.is_read and self._readers is not None:
            if self._readers.identity != block.identity:
                self._readers.give_up()
            self.forget()
        self._readers = _Readers(block, turn, readers, buckets)

    def forget(self) -> None:
        """Nobody reads them, as far as we know."""
        if self._readers is not None:
            self._readers.close()
        self._readers = None


@dataclass(eq=False)
class _Opened:
    """A peer's slots, mapped for this worker's GPU."""

    handle: bytes
    address: int
    named: tuple[object, int]
    """The block's file, and how often a handle had been written into it."""
    used: int = 0


class DeviceSlots:
    """All slots of one worker. Not for several threads.

    Args:
        device: number of the worker's GPU.
        cuda: gives the runtime when it is first needed; raises what the caller is to be told.
    """

    def __init__(self, device: int, cuda: Callable[[], CudaRuntime]) -> None:
        self.device = device
        self._cuda = cuda
        self._own: list[LaneSlots] = []
        self._opened: dict[str, _Opened] = {}
        self._opening = 0

    def begin(self) -> None:
        """Another transfer, or what prepares it, opens what it needs."""
        self._opening += 1

    def end(self) -> None:
        """It has what it needs: let go of what has not been needed for long. Nothing on the device
        uses it."""
        oldest = self._opening - KEPT_OPENINGS
        for name in [name for name, peer in self._opened.items() if peer.used <= oldest]:
            self._close_peer(name)
        self._free(lambda slots: slots.used <= oldest)

    def take(self, block: str, size_bytes: int) -> LaneSlots:
        """Slots for a lane that this worker fills; theirs until the next transfer.

        Raises:
            CudaFailed: the device has no room for them.
        """
        kept = [
            slots
            for slots in self._own
            if slots.size_bytes == size_bytes
            and (slots.block == block or slots.used < self._opening)
        ]
        if kept:
            found = min(kept, key=lambda slots: (slots.block != block, slots.is_read, slots.used))
        else:
            found = self._allocated(block, size_bytes)
        if found.block != block:
            found.block, found.named = block, None
        found.used = self._opening
        return found

    def open_peer(self, block: StagingBlock, size_bytes: int) -> int:
        """The address, for this worker's GPU, of the slots whose handle is in a peer's block.

        Raises:
            SegmentUnavailable: they cannot be opened, or are smaller than they must be.
        """
        named = block.identity, block.word(SHM_HANDLE_SET_OFFSET)
        kept = self._opened.get(block.name)
        if kept is None or kept.named != named:
            handle = block.header_bytes(SHM_HANDLE_OFFSET, CUDA_HANDLE_BYTES)
            for name, peer in list(self._opened.items()):
                is_stale = peer.handle == handle and peer.used < self._opening
                if is_stale or name == block.name:
                    self._close_peer(name)
            kept = _Opened(handle, self._open(block.name, handle, size_bytes), named)
            self._opened[block.name] = kept
        kept.used = self._opening
        return kept.address

    def is_current(self, block: StagingBlock) -> bool:
        """Whether a peer's slots are where they were when they were opened."""
        peer = self._opened.get(block.name)
        return peer is not None and peer.named == (
            block.identity,
            block.word(SHM_HANDLE_SET_OFFSET),
        )

    def close(self) -> None:
        """Let go of everything. Slots that somebody may still read stay as long as this process."""
        for name in list(self._opened):
            self._close_peer(name)
        self._free(lambda slots: True)
        for slots in self._own:
            _logger.warning("slots of %s stay: somebody may still read them", slots.block)
            slots.forget()
        self._own.clear()

    def _allocated(self, block: str, size_bytes: int) -> LaneSlots:
        cuda = self._cuda()
        pages = -(-size_bytes // CUDA_ALIGNMENT_BYTES)
        taken_bytes = max(1, pages) * CUDA_ALIGNMENT_BYTES
        try:
            address = cuda.allocate(self.device, taken_bytes)
        except CudaFailed:
            if not self._free(lambda slots: slots.used < self._opening):
                raise
            address = cuda.allocate(self.device, taken_bytes)
        try:
            handle = cuda.export(address)
        except CudaFailed:
            cuda.free(self.device, address)
            raise
        found = LaneSlots(address, size_bytes, handle, block)
        self._own.append(found)
        return found

    def _free(self, chosen: Callable[[LaneSlots], bool]) -> int:
        """Free some of the slots, unless somebody may read them. How many."""
        freed = [slots for slots in self._own if chosen(slots) and not slots.is_read]
        for slots in freed:
            self._own.remove(slots)
            try:
                self._cuda().free(self.device, slots.address)
            except CudaFailed as error:
                _logger.warning("slots of %s stay: %s", slots.block, error)
        return len(freed)

    def _open(self, name: str, handle: bytes, size_bytes: int) -> int:
        cuda = self._cuda()
        try:
            address = cuda.open_handle(self.device, handle)
        except CudaFailed as error:
            limit = f"must be opened on device {self.device}, by another process than its own"
            found = f"a lane whose slots are not readable ({error})"
            raise SegmentUnavailable(name, found, limit) from error
        try:
            have_bytes = cuda.size_bytes(self.device, address)
        except CudaFailed as error:
            _logger.info("its owner alone says how large a lane's slots are: %s", error)
            return address
        if have_bytes < size_bytes:
            self._close(address)
            limit = f"must hold {size_bytes:,}"
            raise SegmentUnavailable(name, f"a lane of {have_bytes:,} bytes", limit)
        return address

    def _close_peer(self, name: str) -> None:
        self._close(self._opened.pop(name).address)

    def _close(self, address: int) -> None:
        try:
            self._cuda().close_handle(self.device, address)
        except CudaFailed as error:
            _logger.warning("slots of another process stay open: %s", error)
