"""Addresses at which the segments of one version can be read in place.

Owns, for every segment that is a file, a range of addresses as long as the file, without memory
behind it. What a step of the update reads is fetched into it before the step and dropped after it,
so that staging holds one step's bytes, however large the files are. Shared memory has its addresses
already, and memory of GPUs has them if it is a GPU that reads; for a processor it is fetched, like
a file.

A GPU reads what was fetched where it was fetched to: it is registered before the step and let go of
after it, whoever reads it last having come to its end. Where the device does not let go, the
memory stays as it is, as long as this process, and the segment cannot be fetched any more.
"""

from __future__ import annotations

import mmap
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple, Self

import numpy as np

from weightbus.consumers.errors import SegmentUnavailable
from weightbus.consumers.transfer.gpu import Gpu
from weightbus.consumers.transfer.segments import OpenDevice, OpenMemory, OpenSegment

__all__ = ("ByteRange", "StagedSources")

_PAGE_BYTES: Final = resource.getpagesize()

_MAP_NORESERVE: Final = 0x4000
"""Of Linux on every architecture that torch is built for; Python below 3.13 has no name for it."""


class ByteRange(NamedTuple):
    """Bytes of one segment."""

    segment: int
    start: int
    end: int


class StagedSources:
    """The segments of one version. A context manager; not for several threads.

    Args:
        gpu: what reads at the addresses; None: the processor.

    Raises:
        SegmentUnavailable: there are no addresses left for a file.
    """

    addresses: tuple[int, ...]
    """Of every segment's first byte; of a file, what is fetched now can be read there."""
    sizes_bytes: tuple[int, ...]

    def __init__(self, segments: Sequence[OpenSegment], gpu: Gpu | None = None) -> None:
        self._segments, self._gpu = segments, gpu
        self._reserved: dict[int, mmap.mmap] = {}
        self._left: set[int] = set()
        """Segments whose addresses the GPU did not let go of: nothing is fetched there again."""
        self.sizes_bytes = tuple(segment.size_bytes for segment in segments)
        self.addresses = tuple(map(self._address, range(len(segments))))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for reserved in self._reserved.values():
            with suppress(BufferError):  # an error holds on to a view: it is closed with that
                reserved.close()

    @property
    def has_fetched(self) -> bool:
        """Whether any of the segments cannot be read where it is."""
        return bool(self._reserved or self._left)

    @contextmanager
    def fetched(self, ranges: Sequence[ByteRange]) -> Iterator[int]:
        """Within it, the ranges can be read at `addresses`; gives the bytes that were fetched.

        Raises:
            SegmentUnavailable: a file ended too early or cannot be read, or the GPU does not take
                what was fetched, or did not let go of what was fetched of the segment before.
        """
        for wanted in ranges:
            if wanted.segment in self._left:
                name = self._segments[wanted.segment].name
                limit = "must have been let go of before more of it is fetched"
                raise SegmentUnavailable(name, "still registered with the GPU", limit)
        staged = [wanted for wanted in ranges if wanted.segment in self._reserved]
        registered: list[tuple[int, int]] = []
        try:
            for wanted in staged:
                view = memoryview(self._reserved[wanted.segment])[wanted.start : wanted.end]
                with view:
                    self._segments[wanted.segment].read_into(view, wanted.start)
                if self._gpu is not None:
                    registered.append((wanted.segment, self._register(self._gpu, wanted)))
            yield sum(wanted.end - wanted.start for wanted in staged)
        finally:
            for segment, address in registered:
                self._unregister(segment, address)
            for segment in {wanted.segment for wanted in staged} & self._reserved.keys():
                self._reserved[segment].madvise(mmap.MADV_DONTNEED)

    def _register(self, gpu: Gpu, wanted: ByteRange) -> int:
        """Let the GPU read the pages of a range; the address of the first.

        No page is of two ranges: those of a step are further apart than a page is long.
        """
        base = self.addresses[wanted.segment]
        first = (base + wanted.start) // _PAGE_BYTES * _PAGE_BYTES
        end = -(-(base + wanted.end) // _PAGE_BYTES) * _PAGE_BYTES
        gpu.register(self._segments[wanted.segment].name, first, end - first, read_only=False)
        return first

    def _unregister(self, segment: int, address: int) -> None:
        assert self._gpu is not None, "it has registered the memory"
        memory = self._reserved.get(segment)
        if not self._gpu.unregister(self._segments[segment].name, address, memory):
            self._reserved.pop(segment, None)
            self._left.add(segment)

    def _address(self, number: int) -> int:
        segment = self._segments[number]
        in_place = OpenMemory if self._gpu is None else (OpenMemory, OpenDevice)
        if isinstance(segment, in_place):
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
