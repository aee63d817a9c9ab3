"""Opens the segments of a version for reading, on this host. Owns their descriptors and mappings.

Three kinds, read in three ways:
- Shared-memory blocks of a publisher are mapped read-only and read in place. Their owner unlinks
  them but never shortens them, and who has one mapped keeps its memory after that. Nothing in the
  kernel holds an owner to this (seals are for memfd only), so blocks of other users are refused.
  For a worker on a GPU a mapping is registered with it, once, and read by it at the same address.
- Memory of a publisher's GPUs is opened by its IPC handle for the worker's own GPU, which reads it
  in place. Workers without a GPU leave it alone.
- Files are read with `preadv` into memory of our own, also files on tmpfs. A mapped file that
  somebody shortens kills who reads it by SIGBUS, and an engine must not die of that.

Invariant: what a segment says may be read (`size_bytes`) was there when it was opened; `check`
after reading tells whether it still is what it was. Blocking: runs in workers and in threads.
"""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np

from weightbus.bus.cuda import host_device_uuids, open_cuda
from weightbus.consumers.errors import SegmentUnavailable, TornRead
from weightbus.consumers.transfer.gpu import (
    Gpu,
    OpenCuda,
    OpenHandle,
    check_cuda_segment,
    gpu_of,
    name_of,
)
from weightbus.consumers.transfer.opening import (
    check_promise,
    check_stamp,
    file_identity,
    is_orphan,
    open_block,
    open_file,
    open_own_block,
    read_header,
    too_short,
)
from weightbus.schemas.placement import CudaSegment, FileSegment, Segment, SharedMemorySegment
from weightbus.schemas.shared_memory import SHM_GENERATION_OFFSET, SHM_HEADER_BYTES

__all__ = (
    "KEPT_MAPPINGS",
    "KEPT_OPENINGS",
    "OpenDevice",
    "OpenFile",
    "OpenMemory",
    "OpenSegment",
    "SegmentCache",
    "nearest_way",
    "probe_segment",
)

KEPT_OPENINGS: Final = 4
"""Handles of GPU memory that so many openings did not use are closed: a publisher takes two slots
in turn, and an update may open twice, once to prepare. 0 would close all with every opening, before
the update's lease ends."""

KEPT_MAPPINGS: Final = 64
"""Unused blocks that stay mapped and registered, while their owners live. An engine that skips
versions, or follows slowly, finds both slots of its publisher as it left them; to register one anew
takes 0.3 s per 8 GiB. Beyond that, the longest unused go."""

COPY_BYTES: Final = 16 * 2**20
"""Of a GPU's memory, copied at a time."""


class OpenSegment(ABC):
    """One segment of one version, open for reading until its `SegmentCache.open_all` ends."""

    name: str
    """Path or name, for messages."""
    size_bytes: int
    """As the layout says; that much was there when it was opened."""

    @abstractmethod
    def check(self) -> None:
        """What was read since the segment was opened was the promised version.

        Raises:
            TornRead: it was written to.
        """

    @abstractmethod
    def read_into(self, buffer: memoryview, offset_bytes: int) -> None:
        """Fill a buffer with a private copy of what lies at an offset.

        Raises:
            SegmentUnavailable: it ends before the buffer is full.
        """


class OpenMemory(OpenSegment):
    """A mapped block of shared memory."""

    def __init__(self, mapping: _Mapping, size_bytes: int, generation: int) -> None:
        self.name, self.size_bytes = mapping.name, size_bytes
        self._mapping, self._generation = mapping, generation

    @property
    def address(self) -> int:
        """Of the segment's first byte; readable while the segment is open."""
        return self._mapping.address + SHM_HEADER_BYTES

    def check(self) -> None:
        found = self._mapping.generation
        if found != self._generation:
            raise TornRead(self.name, self._generation, found)

    def read_into(self, buffer: memoryview, offset_bytes: int) -> None:
        if offset_bytes + buffer.nbytes > self.size_bytes:
            raise too_short(self.name, self.size_bytes, offset_bytes + buffer.nbytes)
        start = SHM_HEADER_BYTES + offset_bytes
        buffer.cast("B")[:] = self._mapping.bytes.data[start : start + buffer.nbytes]


class OpenDevice(OpenSegment):
    """Memory of a GPU of this host, mapped for the worker's own."""

    def __init__(
        self, name: str, gpu: Gpu, handle: OpenHandle, size_bytes: int, generation: int
    ) -> None:
        self.name, self.size_bytes = name, size_bytes
        self._gpu, self._handle, self._generation = gpu, handle, generation

    @property
    def address(self) -> int:
        """Of the segment's first byte; the worker's GPU may read there while the segment is open,
        and no processor may."""
        return self._handle.base + SHM_HEADER_BYTES

    def check(self) -> None:
        """To be called with the device synchronised: what was read must have been read before.

        Raises:
            TornRead
            SegmentUnavailable: the device cannot tell any more.
        """
        found = self._gpu.generation(self.name, self._handle)
        if found != self._generation:
            raise TornRead(self.name, self._generation, found)

    def read_into(self, buffer: memoryview, offset_bytes: int) -> None:
        rest = buffer.cast("B")
        end = offset_bytes + rest.nbytes
        if end > self.size_bytes:
            raise too_short(self.name, self.size_bytes, end)
        while rest.nbytes:
            count = min(COPY_BYTES, rest.nbytes)
            address = self.address + end - rest.nbytes
            self._gpu.read_into(self.name, address, rest[:count])
            rest = rest[count:]


class OpenFile(OpenSegment):
    """An open file."""

    def __init__(self, fd: int, size_bytes: int, segment: FileSegment) -> None:
        self.name, self.size_bytes = os.readlink(f"/proc/self/fd/{fd}"), size_bytes
        self._fd, self._segment = fd, segment
        self._opened = os.fstat(fd)

    def check(self) -> None:
        """A file has no generation word: its time of modification stands for it."""
        now = os.fstat(self._fd)
        if (now.st_mtime_ns, now.st_size) != (self._opened.st_mtime_ns, self._opened.st_size):
            raise TornRead(self.name, self._opened.st_mtime_ns, now.st_mtime_ns)
        check_stamp(self._segment, now)

    def read_into(self, buffer: memoryview, offset_bytes: int) -> None:
        rest = buffer.cast("B")
        end = offset_bytes + rest.nbytes
        while rest.nbytes:
            try:
                count = os.preadv(self._fd, [rest], end - rest.nbytes)
            except OSError as error:
                raise SegmentUnavailable(self.name, error.strerror, "must be readable") from error
            if not count:
                raise too_short(self.name, end - rest.nbytes, end)
            rest = rest[count:]

    def close(self) -> None:
        os.close(self._fd)


class SegmentCache:
    """The segments that one worker reads. Not for several threads.

    Args:
        host_id: of this host; memory of another one is refused.
        roots: directories below which files may be read, after resolving symbolic links.
        device: of the worker's parameters: `cpu`, `cuda:0`, ... Blocks of shared memory are
            registered with a GPU, whole; memory of GPUs is only read by one.
        cuda: asked for when the GPU first needs it.
    """

    def __init__(
        self,
        host_id: str,
        roots: Sequence[str],
        device: str = "cpu",
        cuda: OpenCuda = open_cuda,
    ) -> None:
        self._host_id, self._roots = host_id, tuple(roots)
        self._device, self._gpu = device, gpu_of(device, cuda)
        self._mappings: dict[str, _Mapping] = {}
        self._update = 0
        self._is_open = False

    @contextmanager
    def open_all(
        self,
        sources: Iterable[Segment],
        sizes_bytes: Iterable[int],
        check: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[OpenSegment, ...]]:
        """Open every segment of one version; mappings and handles are kept for the next one.

        To open a version and close it at once prepares it: the next opening has little to do.

        Whoever leaves this has the device synchronised.

        Args:
            check: called before each is opened, which may take seconds; what it raises is let
                through, and what was opened by then is kept.

        Raises:
            SegmentUnavailable: one is absent, too short, elsewhere, or may not be read.
            TornRead: one holds another version already.
        """
        self._update += 1
        self._is_open = True
        opened: list[OpenSegment] = []
        try:
            for segment, size_bytes in zip(sources, sizes_bytes, strict=True):
                check()
                opened.append(self._open(segment, size_bytes))
            yield tuple(opened)
        finally:
            for item in opened:
                if isinstance(item, OpenFile):
                    item.close()
            self._is_open = False
            self._close_unused()

    def close_handles(self) -> None:
        """Let go of all memory of GPUs, between two versions: what publishers free comes back only
        then. The next version opens again what it needs.
        """
        assert not self._is_open, "what is read is not closed"
        if self._gpu is not None:
            self._gpu.close_handles(used_before=self._update + 1)

    def close(self) -> None:
        """Unmap everything. Nothing on the device reads there."""
        for mapping in self._mappings.values():
            mapping.close()
        self._mappings.clear()
        self.close_handles()

    def _open(self, segment: Segment, size_bytes: int) -> OpenSegment:
        match segment:
            case FileSegment():
                return OpenFile(open_file(segment, size_bytes, self._roots), size_bytes, segment)
            case SharedMemorySegment():
                return self._open_memory(segment, size_bytes)
            case CudaSegment():
                return self._open_device(segment, size_bytes)
        raise _not_of_this_host(segment)

    def _open_memory(self, segment: SharedMemorySegment, size_bytes: int) -> OpenMemory:
        while True:
            access = os.O_RDONLY if self._gpu is None else self._gpu.access(segment.name)
            fd = open_block(segment, size_bytes, self._host_id, access)
            try:
                mapping = self._map(segment.name, fd, writable=access == os.O_RDWR)
            finally:
                os.close(fd)
            if mapping is not None:
                return OpenMemory(mapping, size_bytes, segment.generation)

    def _map(self, name: str, fd: int, *, writable: bool) -> _Mapping | None:
        """None: the device wants another `access`."""
        mapping = self._mappings.get(name)
        if mapping is not None and mapping.identity != file_identity(os.fstat(fd)):
            if mapping.used == self._update:
                raise SegmentUnavailable(name, "made anew meanwhile", "must stay while it is open")
            self._mappings.pop(name).close()
            mapping = None
        if mapping is None:
            try:
                mapping = _Mapping(name, fd, writable=writable)
            except OSError as error:
                raise SegmentUnavailable(name, error.strerror, "must be mapped") from error
            if self._gpu is not None and not mapping.register(self._gpu):
                return None
            self._mappings[name] = mapping
        mapping.used = self._update
        return mapping

    def _open_device(self, segment: CudaSegment, size_bytes: int) -> OpenDevice:
        name = name_of(segment)
        if self._gpu is None:
            limit = f"must be read by a worker on a GPU, and this one is on {self._device}"
            raise SegmentUnavailable(name, "memory of a GPU", limit)
        check_cuda_segment(segment, self._host_id, ())
        try:
            return self._look_into(self._gpu, segment, size_bytes)
        except (SegmentUnavailable, TornRead):
            if not self._gpu.close_stale(segment, self._update):
                raise
        return self._look_into(self._gpu, segment, size_bytes)

    def _look_into(self, gpu: Gpu, segment: CudaSegment, size_bytes: int) -> OpenDevice:
        name = name_of(segment)
        handle = gpu.opened(segment, self._update)
        have_bytes = handle.size_bytes
        if have_bytes is not None and have_bytes < SHM_HEADER_BYTES:
            raise too_short(name, have_bytes, SHM_HEADER_BYTES + size_bytes)
        found, generation = read_header(name, gpu.read(name, handle.base, SHM_HEADER_BYTES))
        if have_bytes is not None:
            found = min(found, have_bytes - SHM_HEADER_BYTES)
        check_promise(name, found, size_bytes, generation, segment.generation)
        handle.read = self._update
        return OpenDevice(name, gpu, handle, size_bytes, segment.generation)

    def _close_unused(self) -> None:
        unused = [one for one in self._mappings.values() if one.used < self._update]
        unused.sort(key=lambda mapping: mapping.used, reverse=True)
        for place, mapping in enumerate(unused):
            if place >= KEPT_MAPPINGS or not _is_owned(mapping):
                self._mappings.pop(mapping.name).close()
        if self._gpu is not None:
            self._gpu.close_handles(used_before=self._update - KEPT_OPENINGS + 1)


def probe_segment(segment: Segment, size_bytes: int, host_id: str, roots: Sequence[str]) -> None:
    """Whether a segment could be opened now, without mapping or reading it.

    Of memory of a GPU that is not known before a worker opens it: only whether it could be opened
    by one of this host. CUDA is not asked.

    Raises:
        SegmentUnavailable, TornRead: as `SegmentCache.open_all`.
    """
    match segment:
        case FileSegment():
            os.close(open_file(segment, size_bytes, roots))
        case SharedMemorySegment():
            os.close(open_block(segment, size_bytes, host_id, os.O_RDONLY))
        case CudaSegment():
            check_cuda_segment(segment, host_id, host_device_uuids())
        case _:
            raise _not_of_this_host(segment)


def nearest_way(
    ways: Iterable[Segment], kinds: Iterable[type[Segment]], probe: Callable[[Segment], None]
) -> tuple[Segment | None, list[str]]:
    """The first way that can be probed, kind by kind; None: there is none. And why others cannot.

    Args:
        probe: raises `SegmentUnavailable` or `TornRead` for a way that cannot be read now.
    """
    offered, reasons = tuple(ways), []
    for way in (way for kind in kinds for way in offered if isinstance(way, kind)):
        try:
            probe(way)
        except (SegmentUnavailable, TornRead) as error:
            reasons.append(str(error))
        else:
            return way, reasons
    return None, reasons


class _Mapping:
    """One block of shared memory, mapped whole."""

    def __init__(self, name: str, fd: int, *, writable: bool) -> None:
        """Read-only unless `writable`, which some devices want; nothing is written."""
        status = os.fstat(fd)
        self.name = name
        self.identity = file_identity(status)
        self.used = 0
        """Number of the opening that used it last."""
        self._writable = writable
        self._gpu: Gpu | None = None
        rights = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, status.st_size, mmap.MAP_SHARED, rights)
        self.bytes = np.frombuffer(self._map, dtype=np.uint8)
        word = slice(SHM_GENERATION_OFFSET, SHM_GENERATION_OFFSET + 8)
        self._generation = self.bytes[word].view("<u8")
        self.address = int(self.bytes.ctypes.data)

    @property
    def generation(self) -> int:
        return int(self._generation[0])

    def register(self, gpu: Gpu) -> bool:
        """Once, whole. If that fails it is closed.

        Returns: False: the device wants it writable.

        Raises:
            SegmentUnavailable: the device does not take it.
        """
        taken = False
        try:
            taken = gpu.register(
                self.name, self.address, self.bytes.nbytes, read_only=not self._writable
            )
        finally:
            if taken:
                self._gpu = gpu
            else:
                self.close()
        return taken

    def close(self) -> None:
        if self._gpu is not None and not self._gpu.unregister(self.name, self.address, self._map):
            return
        del self.bytes, self._generation
        self._map.close()


def _is_owned(mapping: _Mapping) -> bool:
    """Whether a block is still the one of its name, and its owner lives."""
    try:
        fd = open_own_block(mapping.name, os.O_RDONLY)
    except SegmentUnavailable:
        return False
    try:
        return file_identity(os.fstat(fd)) == mapping.identity and not is_orphan(fd)
    finally:
        os.close(fd)


def _not_of_this_host(segment: Segment) -> SegmentUnavailable:
    kind = type(segment).__name__
    return SegmentUnavailable(kind, "not memory of this host", "must be a file or shared memory")
