"""Addresses at which the segments of one version can be read in place.

Owns, for every segment that is a file, a range of addresses as long as the file, without memory
behind it. What a step of the update reads is fetched into it before the step and dropped after it,
so that staging holds one step's bytes, however large the files are. Shared memory has its addresses
already.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple, Self

import numpy as np

from weightbus.consumers.errors import SegmentUnavailable
from weightbus.consumers.transfer.segments import OpenMemory, OpenSegment

__all__ = ("ByteRange", "StagedSources")

_MAP_NORESERVE: Final = 0x4000
"""Of Linux on every architecture that torch is built for; Python below 3.13 has no name for it."""


class ByteRange(NamedTuple):
    """Bytes of one segment."""

    segment: int
    start: int
    end: int


class StagedSources:
    """The segments of one version. A context manager; not for several threads.

    Raises:
        SegmentUnavailable: there are no addresses left for a file.
    """

    addresses: tuple[int, ...]
    """Of every segment's first byte; of a file, what is fetched now can be read there."""
    sizes_bytes: tuple[int, ...]

    def __init__(self, segments: Sequence[OpenSegment]) -> None:
        self._segments = segments
        self._reserved: dict[int, mmap.mmap] = {}
        self.sizes_bytes = tuple(segment.size_bytes for segment in segments)
        self.addresses = tuple(map(self._address, range(len(segments))))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for reserved in self._reserved.values():
            reserved.close()

    @contextmanager
    def fetched(self, ranges: Sequence[ByteRange]) -> Iterator[int]:
        """Within it, the ranges can be read at `addresses`; gives the bytes that were fetched.

        Raises:
            SegmentUnavailable: a file ended too early or cannot be read.
        """
        staged = [wanted for wanted in ranges if wanted.segment in self._reserved]
        try:
            for wanted in staged:
                view = memoryview(self._reserved[wanted.segment])[wanted.start : wanted.end]
                with view:
                    self._segments[wanted.segment].read_into(view, wanted.start)
            yield sum(wanted.end - wanted.start for wanted in staged)
        finally:
            for segment in {wanted.segment for wanted in staged}:
                self._reserved[segment].madvise(mmap.MADV_DONTNEED)

    def _address(self, number: int) -> int:
        segment = self._segments[number]
        if isinstance(segment, OpenMemory):
            return segment.address
        if not segment.size_bytes:
            return 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            reserved = mmap.mmap(-1, segment.size_bytes, flags=flags)
        except OSError as error:
            limit = "must fit into the address space that this process may have"
            raise SegmentUnavailable(
                segment.name, f"{segment.size_bytes} bytes long", limit
            ) from error
        with suppress(OSError):  # a kernel without them; twice as fast with them
            reserved.madvise(mmap.MADV_HUGEPAGE)
        self._reserved[number] = reserved
        return int(np.frombuffer(reserved, dtype=np.uint8).ctypes.data)
