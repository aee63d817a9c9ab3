"""A named shared-memory block that this process owns: a header page, then data.

Owns one file below /dev/shm, its mapping, and a lock on it. Blocking; runs in worker threads.

- The file is created exclusively, with mode 0600, and its memory is allocated at once, so that a
  full /dev/shm is an error here and not a SIGBUS in the middle of a copy.
- The lock (`flock`) lives as long as the owner, and children it forked: whoever can take it knows
  that the owner is gone (`weightbus.bus.sweep`). Readers never lock.
- Where the mount gives huge pages to whoever asks (`huge=advise`), its memory is that: filling
  8 GiB takes 0.26 s instead of 1.9 s. By default a mount has none, and asking is harmless.
- The generation word only grows; odd while the data may be half written, also when the writer
  was cancelled or killed in between, and even while the data is one whole version.

Memory order: the generation is one aligned 8-byte store. x86-64 keeps stores in order, so a reader
that still sees the old word saw old data. Weaker machines may reorder it against the data, and
`warn_unless_ordered` says so; there, as everywhere, the leases keep readers away from a slot that
is written, and the digest proves what they read. The generation that readers are promised travels
over the bus, after the data.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Final

from weightbus.bus.errors import SharedMemoryFull, SharedMemoryUnavailable
from weightbus.schemas.shared_memory import (
    SHM_GENERATION_OFFSET,
    SHM_HEADER_BYTES,
    pack_shm_header,
)

__all__ = (
    "COPY_PREFIX",
    "SHM_DIRECTORY",
    "SHM_PREFIX",
    "STAGE_PREFIX",
    "SharedBlock",
    "check_room",
    "gives_huge_pages",
    "warn_unless_ordered",
)

_logger = logging.getLogger(__name__)

SHM_DIRECTORY: Final = Path("/dev/shm")
SHM_PREFIX: Final = "weightbus-"
"""Of every block; that of a publisher goes on with its model."""

STAGE_PREFIX: Final = "weightbus-stage."
"""Of the blocks that a consumer stages bytes in for its engine's workers; its model follows."""

COPY_PREFIX: Final = "weightbus-copy."
"""Of the blocks that a consumer keeps a copy of a version in; its model follows."""

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM})

_ALLOCATION_BYTES: Final = 256 * 2**20
"""Allocated at a time: a signal makes the kernel begin a step again, so steps must be short."""

_POPULATE_WRITE: Final = 23
"""MADV_POPULATE_WRITE of Linux 5.14, which Python has no name for: as if every page were written,
but that an error is an error and no SIGBUS."""

_MOUNTS: Final = Path("/proc/self/mounts")

_CREATE_ATTEMPTS: Final = 8

_ORDERED: Final = frozenset({"x86_64", "amd64"})
"""Machines that keep the stores of a processor in their order, and its loads."""


class SharedBlock:
    """One block, from its creation to `close`. Not for several threads at once."""

    name: str
    """Below the directory; readers open it by this name."""
    size_bytes: int
    """Of the data, without the header."""

    def __init__(
        self, name: str, size_bytes: int, generation: int = 0, directory: Path = SHM_DIRECTORY
    ) -> None:
        """Create the block; `generation` (even) is where its word goes on from.

        Raises:
            SharedMemoryFull: it does not fit.
            SharedMemoryUnavailable: it exists already, or the system refuses it.
        """
        self.name, self.size_bytes = name, size_bytes
        self._path = directory / name
        self._fd = _create(self._path, SHM_HEADER_BYTES + size_bytes)
        try:
            self._map = mmap.mmap(self._fd, SHM_HEADER_BYTES + size_bytes)
        except OSError as error:
            self._path.unlink()
            os.close(self._fd)
            raise SharedMemoryUnavailable(str(self._path), str(error.strerror)) from error
        _ask_for_huge_pages(self._map)
        header = pack_shm_header(size_bytes, generation)
        self._map[: len(header)] = header
        word = slice(SHM_GENERATION_OFFSET, SHM_GENERATION_OFFSET + 8)
        self._generation = memoryview(self._map)[word].cast("Q")
        self._closed = False

    @property
    def generation(self) -> int:
        """The word in the header."""
        return self._generation[0]

    @property
    def address(self) -> int:
        """Of the data's first byte in this process; valid until the last view of it is gone."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + SHM_HEADER_BYTES

    @property
    def data(self) -> memoryview:
        """The data, for those who agree by other words than the generation. Keeps it mapped."""
        return memoryview(self._map)[SHM_HEADER_BYTES:]

    def words(self, offset_bytes: int, count: int) -> memoryview:
        """`count` aligned 8-byte words of the header. Keeps the block mapped."""
        assert offset_bytes % 8 == 0
        assert offset_bytes + 8 * count <= SHM_HEADER_BYTES
        return memoryview(self._map)[offset_bytes : offset_bytes + 8 * count].cast("Q")

    def begin_write(self) -> memoryview:
        """Make the generation odd, then give out the data to be written.

        The view is valid until `close`; drop it before.
        """
        self._generation[0] |= 1
        return memoryview(self._map)[SHM_HEADER_BYTES:]

    def end_write(self) -> int:
        """Make the generation even: the data is whole. Returns the generation to promise."""
        self._generation[0] += 1
        os.utime(self._fd)  # stores to a mapping do not: a sweep looks how old the data is
        return self._generation[0]

    def close(self) -> None:
        """Remove the name and the lock. Idempotent; does not wait.

        Who has the block mapped keeps its memory, unchanged, until he unmaps it. Our own
        mapping goes with its last view.
        """
        if self._closed:
            return
        self._closed = True
        self._path.unlink(missing_ok=True)
        os.close(self._fd)
        del self._generation, self._map


def check_room(need_bytes: int, reclaimed_bytes: int = 0, directory: Path = SHM_DIRECTORY) -> None:
    """Whether `need_bytes` fit once `reclaimed_bytes` are given up.

    Raises:
        SharedMemoryFull
    """
    have_bytes = _free_bytes(directory) + reclaimed_bytes
    if have_bytes < need_bytes:
        raise SharedMemoryFull(str(directory), need_bytes, have_bytes)


def warn_unless_ordered(machine: str | None = None) -> bool:
    """Say so where words in shared memory may be seen before the data they speak of.

    To be called once, at the start of whoever stages bytes for others or reads them.

    Args:
        machine: as `platform.machine` names it; None: this one.

    Returns: whether the machine keeps the order.
    """
    machine = platform.machine() if machine is None else machine
    ordered = machine.lower() in _ORDERED
    if not ordered:
        _logger.warning(
            "this machine is %s: weightbus relies on the store order of x86-64 where processes "
            "share memory. Here a worker may be told of bytes before it can see them; the digest "
            "finds that out, and the update fails: publish weights_digest, or do not stage",
            machine,
        )
    return ordered


def _create(path: Path, size_bytes: int) -> int:
    """A locked, allocated file that nobody else has; its descriptor."""
    try:
        check_room(size_bytes, directory=path.parent)
        fd = _create_locked(path)
    except OSError as error:
        raise SharedMemoryUnavailable(str(path), str(error.strerror)) from error
    try:
        if gives_huge_pages(path.parent):
            _populate(fd, size_bytes)
        for offset_bytes in range(0, size_bytes, _ALLOCATION_BYTES):
            os.posix_fallocate(fd, offset_bytes, min(_ALLOCATION_BYTES, size_bytes - offset_bytes))
    except OSError as error:
        path.unlink()
        os.close(fd)
        if error.errno not in _FULL:
            raise SharedMemoryUnavailable(str(path), str(error.strerror)) from error
        have_bytes = _free_bytes(path.parent)
        raise SharedMemoryFull(str(path.parent), size_bytes, have_bytes) from error
    return fd


def gives_huge_pages(directory: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether a directory is a mount that gives huge pages to those who ask for them. A mount that
    gives them to everybody (`huge=always`) needs no asking."""
    try:
        lines = mounts.read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    options = ""
    for line in lines:
        _, place, _, found, *_ = line.split(" ")
        if place == str(directory):
            options = found  # the last mount hides the ones before
    return "huge=advise" in options.split(",")


def _ask_for_huge_pages(memory: mmap.mmap) -> None:
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)


def _populate(fd: int, size_bytes: int) -> None:
    """Allocate huge pages: what is allocated by the descriptor alone is small ones. What is left
    out is allocated as everywhere, with an error that says why it could not be."""
    os.ftruncate(fd, size_bytes)
    with mmap.mmap(fd, size_bytes) as memory:
        _ask_for_huge_pages(memory)
        try:
            for offset_bytes in range(0, size_bytes, _ALLOCATION_BYTES):
                length_bytes = min(_ALLOCATION_BYTES, size_bytes - offset_bytes)
                memory.madvise(_POPULATE_WRITE, offset_bytes, length_bytes)
        except OSError as error:
            _logger.info("huge pages are left to the first write: %s", error.strerror)


def _create_locked(path: Path) -> int:
    """Between creation and lock a file looks as if its owner were gone: a sweep may remove it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(_CREATE_ATTEMPTS):
        fd = os.open(path, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            path.unlink(missing_ok=True)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)
    raise SharedMemoryUnavailable(str(path), f"was removed {_CREATE_ATTEMPTS} times while made")


def _free_bytes(directory: Path) -> int:
    room = os.statvfs(directory)
    return room.f_bavail * room.f_frsize
