"""The benchmark's processes: those that run until they are ended, and those that take commands.

Owns every process it starts, each in a session of its own, with what it prints in a log file;
leaving `open_processes` ends them all, by force if they must be, with all that they have started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
import msgspec
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from weightbus.bus.guard import guarded_command

__all__ = ("BenchFailed", "Commanded", "Processes", "answer_commands", "open_processes")

ROOT: Final = Path(__file__).parents[2]
STOP_S: Final = 20.0
MAX_LINE_BYTES: Final = 2**24
LOG_TAIL_LINES: Final = 12
PR_SET_PDEATHSIG: Final = 1

T = TypeVar("T")


class BenchFailed(Exception):
    """A part of the benchmark cannot go on; says why."""


class Commanded:
    """A process that answers each line of JSON on its stdin with one on its stdout."""

    def __init__(self, name: str, process: Process, log: Path) -> None:
        assert process.stdout is not None
        self._name, self._process, self._log = name, process, log
        self._lines = BufferedByteReceiveStream(process.stdout)
        self._owed = 0
        """Answers that nobody waited for to the end."""

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, command: msgspec.Struct, answer: type[T], deadline_s: float) -> T:
        """
        Raises:
            BenchFailed: it is gone, or does not answer in time.
        """
        assert self._process.stdin is not None
        try:
            with anyio.fail_after(deadline_s):
                while self._owed:
                    await self._answer()
                await self._process.stdin.send(msgspec.json.encode(command) + b"\n")
                self._owed += 1
                line = await self._answer()
        except TimeoutError:
            reason = f"{self._name} did not answer within {deadline_s:g} s"
            raise BenchFailed(f"{reason}: {tail(self._log)}") from None
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.IncompleteRead):
            raise BenchFailed(f"{self._name} is gone: {tail(self._log)}") from None
        return msgspec.json.decode(line, type=answer)

    async def _answer(self) -> bytes:
        line = await self._lines.receive_until(b"\n", MAX_LINE_BYTES)
        self._owed -= 1
        return line


class Processes:
    """Made by `open_processes`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        """Of logs, and of what else processes share."""
        self._running: dict[str, Process] = {}

    async def start_commanded(self, name: str, module: str, arguments: msgspec.Struct) -> Commanded:
        """`python -m module`, told `arguments`; it ends with its stdin, and with this process."""
        argv = [sys.executable, "-m", module, msgspec.json.encode(arguments).decode()]
        process = await self._start(name, argv, subprocess.PIPE)
        return Commanded(name, process, self._log(name))

    async def start_guarded(
        self,
        name: str,
        module: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`python -m module` until it is ended; ended in order, by SIGTERM.

        Args:
            environment: beside this process's own.
        """
        argv = guarded_command([sys.executable, "-m", module, *arguments])
        await self._start(name, argv, None, environment)

    async def end(self, name: str) -> None:
        """Returns when it is gone, in whatever way; nothing is done if it was never started."""
        process = self._running.pop(name, None)
        if process is None:
            return
        if process.stdin is not None:
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                await process.stdin.aclose()
        with anyio.move_on_after(STOP_S):
            await process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    def has_ended(self, name: str) -> bool:
        """By itself."""
        return self._running[name].returncode is not None

    def check(self) -> None:
        """
        Raises:
            BenchFailed: a process has ended by itself.
        """
        for name, process in self._running.items():
            if process.returncode is not None:
                how = f"{name} ended with status {process.returncode}"
                raise BenchFailed(f"{how}: {tail(self._log(name))}")

    async def end_all(self) -> None:
        async with anyio.create_task_group() as tasks:
            for name in list(self._running):
                tasks.start_soon(self.end, name)

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    async def _start(
        self,
        name: str,
        argv: list[str],
        stdout: int | None,
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        with self._log(name).open("ab") as log:
            process = await anyio.open_process(
                argv,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=log if stdout is None else stdout,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,
            )
        self._running[name] = process
        return process


@asynccontextmanager
async def open_processes(directory: Path) -> AsyncIterator[Processes]:
    processes = Processes(directory)
    try:
        yield processes
    finally:
        with anyio.CancelScope(shield=True):
            await processes.end_all()


def answer_commands(kind: Any) -> Iterator[tuple[Any, Callable[[msgspec.Struct], None]]]:
    """In a process that takes commands: each of them, and what to call with its answer.

    Args:
        kind: of the commands: a struct, or a union of structs.

    The process dies with its parent. What was stdout is for answers: libraries that print there
    print to stderr from now on.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(said: msgspec.Struct) -> None:
        answers.write(msgspec.json.encode(said) + b"\n")

    return ((msgspec.json.decode(line, type=kind), answer) for line in sys.stdin)


def tail(log: Path) -> str:
    """What a process printed last."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:]) or "it printed nothing"
