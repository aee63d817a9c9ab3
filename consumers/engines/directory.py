"""The directory where one engine, its consumer and its clients meet. Owns nothing in it.

Only its owner may enter it (mode 0700): whoever can open a socket there can change what is served.
Every socket has a lock beside it, held by the process that is bound to the socket: the kernel drops
the lock when that process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightbus.consumers.errors import EngineUnavailable

__all__ = ("MAX_SOCKET_PATH_BYTES", "EngineDirectory", "is_owned", "own_socket", "socket_path")

MAX_SOCKET_PATH_BYTES = 107
"""`sockaddr_un.sun_path` has 108 bytes on Linux, the last of them 0: see unix(7)."""

_MODE = 0o700


class EngineDirectory:
    """Paths in one engine's directory."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            EngineUnavailable: the path is too long for the sockets in it.
        """
        self.path = path.absolute()
        self.control = socket_path(self.path / "control.ipc")
        """Bound by the consumer; every rank connects."""
        self.front = socket_path(self.path / "front.ipc")
        """Bound by the engine's front process; clients and the consumer connect."""
        self.ranks = socket_path(self.path / "ranks.ipc")
        """Bound by the front process; every rank connects."""
        self.rendezvous = self.path / "rendezvous"
        """Where the ranks find each other when they start."""
        self.log = self.path / "engine.log"
        """What the front process prints when a consumer has started it."""

    def prepare(self) -> None:
        """Create the directory, or see that nobody else can enter it.

        Raises:
            EngineUnavailable: it cannot be created, or others may enter it.
        """
        try:
            self.path.mkdir(mode=_MODE, parents=True, exist_ok=True)
        except OSError as error:
            reason = f"cannot be created: {error.strerror}"
            raise EngineUnavailable(str(self.path), reason) from None
        self.check()

    def check(self) -> None:
        """
        Raises:
            EngineUnavailable: there is no such directory, or others may enter it.
        """
        try:
            found = self.path.stat()
        except OSError as error:
            raise EngineUnavailable(str(self.path), f"no directory: {error.strerror}") from None
        mode = stat.S_IMODE(found.st_mode)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or mode & 0o077:
            raise EngineUnavailable(
                str(self.path),
                f"is owned by user {found.st_uid} with mode {mode:04o}: "
                f"it must be a directory of user {os.getuid()} with mode {_MODE:04o}",
            )


def socket_path(path: Path) -> Path:
    """The path, if a unix socket can be bound to it.

    Raises:
        EngineUnavailable: it is too long.
    """
    size_bytes = len(os.fsencode(path))
    if size_bytes > MAX_SOCKET_PATH_BYTES:
        raise EngineUnavailable(
            str(path.parent),
            f"socket path {path} has {size_bytes} bytes: "
            f"a unix socket takes at most {MAX_SOCKET_PATH_BYTES}; choose a shorter directory",
        )
    return path


@contextmanager
def own_socket(socket: Path) -> Iterator[None]:
    """Hold the lock beside a socket that is about to be bound; at the end neither file is left.

    Raises:
        EngineUnavailable: another process holds it.
    """
    lock = socket.with_suffix(".lock")
    descriptor = _lock_nowait(lock)
    if descriptor is None:
        raise EngineUnavailable(str(socket), "another process is bound to it")
    try:
        yield
    finally:
        socket.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def is_owned(socket: Path) -> bool:
    """Whether a process that lives holds the lock beside a socket."""
    try:
        descriptor = os.open(socket.with_suffix(".lock"), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _lock_nowait(lock: Path) -> int | None:
    """The descriptor that holds the lock; None if another process does."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.close(descriptor)  # its last holder removed the file between our open and our lock
