"""Memory that reads go to, and what should be in it."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np

from tests.integration.p2p.source import content
from weightbus.consumers.transfer.fetch import Read

__all__ = ("Target",)


class Target:
    """Room for whole segments, one after another."""

    def __init__(self, sizes_bytes: Sequence[int]) -> None:
        self._sizes_bytes = tuple(sizes_bytes)
        self._map = mmap.mmap(-1, sum(sizes_bytes) + 4096)
        self.bytes = np.frombuffer(self._map, dtype=np.uint8)

    @property
    def address(self) -> int:
        return int(self.bytes.ctypes.data)

    @property
    def size_bytes(self) -> int:
        return len(self.bytes)

    def reads(self, cut_bytes: int = 2**62) -> list[Read]:
        """Everything, in reads of at most `cut_bytes`."""
        reads, begin = [], self.address
        for number, size_bytes in enumerate(self._sizes_bytes):
            reads += [
                Read(number, offset, begin + offset, min(cut_bytes, size_bytes - offset))
                for offset in range(0, size_bytes, cut_bytes)
            ]
            begin += size_bytes
        return reads

    def check(self, version: int = 1) -> None:
        """It holds that version, whole."""
        begin = 0
        for number, size_bytes in enumerate(self._sizes_bytes):
            found = self.bytes[begin : begin + size_bytes]
            wrong = np.flatnonzero(found != content(number, size_bytes, version))
            assert not len(wrong), f"{len(wrong)} bytes of segment {number}, first at {wrong[0]}"
            begin += size_bytes
