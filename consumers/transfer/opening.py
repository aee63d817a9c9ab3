"""Descriptors of what may be read on this host: files below the allowed roots, blocks of our own.

Owns nothing: who asks for a descriptor closes it. Blocking. What comes back was checked by its
descriptor, not by its name: nobody can put another file under it in between.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from msgspec.structs import replace

from weightbus.consumers.errors import SegmentUnavailable, TornRead
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.placement import FileSegment, SharedMemorySegment
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES, unpack_shm_header

__all__ = (
    "check_promise",
    "check_stamp",
    "file_identity",
    "is_orphan",
    "open_block",
    "open_file",
    "open_own_block",
    "read_header",
    "stamped",
    "too_short",
)

SHM_DIRECTORY: Final = Path("/dev/shm")


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


def open_file(segment: FileSegment, size_bytes: int, roots: Sequence[str]) -> int:
    real_roots = [os.path.realpath(root) for root in roots]
    fd = _open(segment.path, os.path.realpath(segment.path), real_roots)
    with _closing_on_error(fd):
        status = os.fstat(fd)
        if status.st_size < size_bytes:
            raise too_short(segment.path, status.st_size, size_bytes)
        check_stamp(segment, status)
    return fd


def check_stamp(segment: FileSegment, status: os.stat_result) -> None:
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


def open_block(segment: SharedMemorySegment, size_bytes: int, host_id: str, access: int) -> int:
    """A descriptor of a block, after every check that needs no mapping."""
    if segment.host_id != host_id:
        raise SegmentUnavailable(
            segment.name, f"on host {segment.host_id}", f"must be on this one, {host_id}"
        )
    fd = open_own_block(segment.name, access)
    with _closing_on_error(fd):
        promised, generation = read_header(segment.name, os.pread(fd, SHM_HEADER_BYTES, 0))
        found = min(promised, os.fstat(fd).st_size - SHM_HEADER_BYTES)
        check_promise(segment.name, found, size_bytes, generation, segment.generation)
    return fd


def is_orphan(fd: int) -> bool:
    """Whether the owner of a block is gone: it holds a lock as long as it lives. The lock is only
    tried, and given back at once."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def read_header(name: str, header: bytes) -> tuple[int, int]:
    """Bytes and generation of a block."""
    try:
        return unpack_shm_header(header)
    except MessageInvalid as error:
        raise SegmentUnavailable(name, "not a block of ours", str(error)) from error


def check_promise(
    name: str, found_bytes: int, size_bytes: int, found_generation: int, generation: int
) -> None:
    if found_bytes < size_bytes:
        raise too_short(name, found_bytes, size_bytes)
    if found_generation != generation:
        raise TornRead(name, generation, found_generation)


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


def file_identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_size
