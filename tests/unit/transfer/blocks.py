"""Shared-memory blocks as a publisher makes them, for tests of the engine's side."""

from __future__ import annotations

import fcntl
import mmap
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightbus.schemas.placement import SharedMemorySegment
from weightbus.schemas.shared_memory import (
    SHM_GENERATION_OFFSET,
    SHM_HEADER_BYTES,
    pack_shm_header,
)

__all__ = ("Block", "open_block")


class Block:
    """One block; `data` may be written, `generation` set at will."""

    def __init__(self, name: str, size_bytes: int, host_id: str) -> None:
        self.name, self.host_id = name, host_id
        self.path = Path("/dev/shm") / name
        self.size_bytes = size_bytes
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self.fd, fcntl.LOCK_EX)  # its owner lives: nobody sweeps it away
        os.ftruncate(self.fd, SHM_HEADER_BYTES + size_bytes)
        self._map = mmap.mmap(self.fd, SHM_HEADER_BYTES + size_bytes)
        header = pack_shm_header(size_bytes, 2)
        self._map[: len(header)] = header

    @property
    def generation(self) -> int:
        return int.from_bytes(
            self._map[SHM_GENERATION_OFFSET : SHM_GENERATION_OFFSET + 8], "little"
        )

    @generation.setter
    def generation(self, value: int) -> None:
        word = value.to_bytes(8, "little")
        self._map[SHM_GENERATION_OFFSET : SHM_GENERATION_OFFSET + 8] = word

    def word(self, offset_bytes: int) -> int:
        return int.from_bytes(self._map[offset_bytes : offset_bytes + 8], "little")

    def set_word(self, offset_bytes: int, value: int) -> None:
        self._map[offset_bytes : offset_bytes + 8] = value.to_bytes(8, "little")

    def put(self, offset_bytes: int, value: bytes) -> None:
        """Write a part of the data."""
        start = SHM_HEADER_BYTES + offset_bytes
        self._map[start : start + len(value)] = value

    @property
    def data(self) -> bytes:
        return self._map[SHM_HEADER_BYTES:]

    @data.setter
    def data(self, value: bytes) -> None:
        self._map[SHM_HEADER_BYTES : SHM_HEADER_BYTES + len(value)] = value

    def write(self, value: bytes) -> SharedMemorySegment:
        """A whole new version, as a publisher writes it."""
        self.generation += 1
        self.data = value
        self.generation += 1
        return self.segment()

    def segment(self) -> SharedMemorySegment:
        """The promise of what the block holds now."""
        return SharedMemorySegment(name=self.name, host_id=self.host_id, generation=self.generation)

    def unlink(self) -> None:
        """What a publisher does when it closes."""
        self.path.unlink(missing_ok=True)


@contextmanager
def open_block(data: bytes, host_id: str, name: str | None = None) -> Iterator[Block]:
    """A block that holds `data` as its first version; removed at the end."""
    block = Block(name or f"weightbus-test-{uuid.uuid4().hex}", len(data), host_id)
    block.data = data
    try:
        yield block
    finally:
        block.unlink()
        os.close(block.fd)
