"""Opens the segments of a version for reading, on this host. Owns their descriptors and mappings.

Two kinds, read in two ways:
- Shared-memory blocks of a publisher are mapped read-only and read in place. Their owner unlinks
  them but never shortens them, and who has one mapped keeps its memory after that. Nothing in the
  kernel holds an owner to this (seals are for memfd only), so blocks of other users are refused.
- Files are read with `preadv` into memory of our own, also files on tmpfs. A mapped file that
  somebody shortens kills who reads it by SIGBUS, and an engine must not die of that.

Invariant: what a segment says may be read (`size_bytes`) was there when it was opened; `check`
after reading tells whether it still is what it was. Blocking: runs in workers and in threads.
"""

from __future__ import annotations

import mmap
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from msgspec.structs import replace

from weightbus.consumers.errors import SegmentUnavailable, TornRead
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.placement import FileSegment, Segment, SharedMemorySegment
from weightbus.schemas.shared_memory import (
    SHM_GENERATION_OFFSET,
    SHM_HEADER_BYTES,
    unpack_shm_header,
)

__all__ = (
    "OpenFile",
    "OpenMemory",
    "OpenSegment",
    "SegmentCache",
    "file_identity",
    "open_own_block",
    "nearest_way",
    "probe_segment",
    "stamped",
    "too_short",
)

SHM_DIRECTORY: Final = Path("/dev/shm")

KEPT_UPDATES: Final = 2
"""Mappings that so many updates did not use are closed: a publisher takes two slots in turn."""


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
        _check_stamp(self._segment, now)

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
        host_id: of this host; blocks of shared memory of another one are refused.
        roots: directories below which files may be read, after resolving symbolic links.
    """

    def __init__(self, host_id: str, roots: Sequence[str]) -> None:
        self._host_id, self._roots = host_id, tuple(roots)
        self._mappings: dict[str, _Mapping] = {}
        self._update = 0

    @contextmanager
    def open_all(
        self, sources: Iterable[Segment], sizes_bytes: Iterable[int]
    ) -> Iterator[tuple[OpenSegment, ...]]:
        """Open every segment of one version; mappings are kept for the next one.

        Raises:
            SegmentUnavailable: one is absent, too short, elsewhere, or may not be read.
            TornRead: one holds another version already.
        """
        self._update += 1
        opened: list[OpenSegment] = []
        try:
            for segment, size_bytes in zip(sources, sizes_bytes, strict=True):
                opened.append(self._open(segment, size_bytes))
            yield tuple(opened)
        finally:
            for item in opened:
                if isinstance(item, OpenFile):
                    item.close()
            self._close_unused()

    def close(self) -> None:
        """Unmap everything."""
        for mapping in self._mappings.values():
            mapping.close()
        self._mappings.clear()

    def _open(self, segment: Segment, size_bytes: int) -> OpenSegment:
        fd = _open_checked(segment, size_bytes, self._host_id, self._roots)
        if isinstance(segment, FileSegment):
            return OpenFile(fd, size_bytes, segment)
        assert isinstance(segment, SharedMemorySegment), "others have been refused"
        try:
            mapping = self._map(segment.name, fd)
        finally:
            os.close(fd)
        return OpenMemory(mapping, size_bytes, segment.generation)

    def _map(self, name: str, fd: int) -> _Mapping:
        mapping = self._mappings.get(name)
        if mapping is not None and mapping.identity != file_identity(os.fstat(fd)):
            if mapping.used == self._update:
                raise SegmentUnavailable(name, "made anew meanwhile", "must stay while it is open")
            self._mappings.pop(name).close()
            mapping = None
        if mapping is None:
            try:
                mapping = self._mappings[name] = _Mapping(name, fd)
            except OSError as error:
                raise SegmentUnavailable(name, error.strerror, "must be mapped") from error
        mapping.used = self._update
        return mapping

    def _close_unused(self) -> None:
        for name, mapping in list(self._mappings.items()):
            if mapping.used <= self._update - KEPT_UPDATES:
                self._mappings.pop(name).close()


def probe_segment(segment: Segment, size_bytes: int, host_id: str, roots: Sequence[str]) -> None:
    """Whether a segment could be opened now, without mapping or reading it.

    Raises:
        SegmentUnavailable, TornRead: as `SegmentCache.open_all`.
    """
    os.close(_open_checked(segment, size_bytes, host_id, roots))


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


def stamped(segment: FileSegment) -> FileSegment:
    """A file with its present size and time: every worker will read this one or none. Blocking.

    To be called on the reading host, before the file's header is read: whoever copies a file to
    another host gives it another time.

    Raises:
        SegmentUnavailable: there is no such file.
    """
    try:
        status = os.stat(segment.path)
    except OSError as error:
        raise SegmentUnavailable(segment.path, error.strerror, "must be a file") from error
    return replace(segment, size_bytes=status.st_size, modified_ns=status.st_mtime_ns)


class _Mapping:
    """One block of shared memory, mapped whole and read-only."""

    def __init__(self, name: str, fd: int) -> None:
        status = os.fstat(fd)
        self.name = name
        self.identity = file_identity(status)
        self.used = 0
        """Number of the update that opened it last."""
        self._map = mmap.mmap(fd, status.st_size, mmap.MAP_SHARED, mmap.PROT_READ)
        self.bytes = np.frombuffer(self._map, dtype=np.uint8)
        word = slice(SHM_GENERATION_OFFSET, SHM_GENERATION_OFFSET + 8)
        self._generation = self.bytes[word].view("<u8")
        self.address = int(self.bytes.ctypes.data)

    @property
    def generation(self) -> int:
        return int(self._generation[0])

    def close(self) -> None:
        del self.bytes, self._generation
        self._map.close()


def file_identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_size


def _open_checked(segment: Segment, size_bytes: int, host_id: str, roots: Sequence[str]) -> int:
    """A descriptor of what a segment names, after every check that needs no mapping."""
    match segment:
        case FileSegment():
            return _open_file(segment, size_bytes, roots)
        case SharedMemorySegment():
            if segment.host_id != host_id:
                raise SegmentUnavailable(
                    segment.name, f"on host {segment.host_id}", f"must be on this one, {host_id}"
                )
            return _open_block(segment, size_bytes)
    kind = type(segment).__name__
    raise SegmentUnavailable(kind, "not memory of this host", "must be a file or shared memory")


def _open_file(segment: FileSegment, size_bytes: int, roots: Sequence[str]) -> int:
    real_roots = [os.path.realpath(root) for root in roots]
    fd = _open(segment.path, os.path.realpath(segment.path), real_roots)
    with _closing_on_error(fd):
        status = os.fstat(fd)
        if status.st_size < size_bytes:
            raise too_short(segment.path, status.st_size, size_bytes)
        _check_stamp(segment, status)
    return fd


def _check_stamp(segment: FileSegment, status: os.stat_result) -> None:
    """A file is the one that was stamped, if it was: see `stamped`.

    Raises:
        SegmentUnavailable: it has another size.
        TornRead: it was modified since.
    """
    if segment.size_bytes and status.st_size != segment.size_bytes:
        limit = f"must be {segment.size_bytes}, as when its header was read"
        raise SegmentUnavailable(segment.path, f"{status.st_size} bytes long", limit)
    if segment.modified_ns and status.st_mtime_ns != segment.modified_ns:
        raise TornRead(segment.path, segment.modified_ns, status.st_mtime_ns)


def _open_block(segment: SharedMemorySegment, size_bytes: int) -> int:
    fd = open_own_block(segment.name, os.O_RDONLY)
    with _closing_on_error(fd):
        try:
            promised, generation = unpack_shm_header(os.pread(fd, SHM_HEADER_BYTES, 0))
        except MessageInvalid as error:
            raise SegmentUnavailable(segment.name, "not a block of ours", str(error)) from error
        found = min(promised, os.fstat(fd).st_size - SHM_HEADER_BYTES)
        if found < size_bytes:
            raise too_short(segment.name, found, size_bytes)
        if generation != segment.generation:
            raise TornRead(segment.name, segment.generation, generation)
    return fd


def open_own_block(name: str, access: int) -> int:
    """A descriptor of a block of shared memory, of this user or root; `access` is O_RDONLY or
    O_RDWR. What is in it has not been looked at.

    Raises:
        SegmentUnavailable: it is absent, of another user, or no regular file. Its cause is a
            `FileNotFoundError` if it is absent.
    """
    fd = _open(name, str(SHM_DIRECTORY / name), [str(SHM_DIRECTORY)], access)
    with _closing_on_error(fd):
        owner = os.fstat(fd).st_uid
        if owner not in (os.geteuid(), 0):
            limit = "must be of this user or root"
            raise SegmentUnavailable(name, f"owned by user {owner}", limit)
    return fd


def _open(name: str, path: str, roots: Sequence[str], access: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file at or below one of `roots`, which hold no symbolic links."""
    if not _below(path, roots):
        raise _outside(name, path, roots)
    try:
        # Not following a link at the end, nor waiting for the writer of a pipe.
        fd = os.open(path, access | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise SegmentUnavailable(name, error.strerror, "must be a file that can be read") from error
    with _closing_on_error(fd):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise SegmentUnavailable(name, "not a regular file", "must be one")
        opened = os.readlink(f"/proc/self/fd/{fd}")  # a directory may have become a link meanwhile
        if not _below(opened, roots):
            raise _outside(name, opened, roots)
    return fd


def _below(path: str, roots: Sequence[str]) -> bool:
    return any(Path(path).is_relative_to(root) for root in roots)


@contextmanager
def _closing_on_error(fd: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(fd)
        raise


def too_short(name: str, found: int, wanted: int) -> SegmentUnavailable:
    return SegmentUnavailable(name, f"{found} bytes long", f"must hold at least {wanted} bytes")


def _outside(name: str, path: str, roots: Sequence[str]) -> SegmentUnavailable:
    return SegmentUnavailable(name, f"at {path}", f"must lie below {', '.join(roots) or 'no root'}")
