"""The processes of the demo: one trainer, and for every engine its consumer and what that needs.

Owns every process it starts, each in a session of its own, with its output in a log file; leaving
`open_fleet` ends them all, in order if they can, by force if they must. An engine's consumer has
the engine's name; what else belongs to an engine has a name of its own after a dot: `a.vllm`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from weightbus.bus.guard import guarded_command
from weightbus.bus.sweep import sweep_staging
from weightbus.cli.demo.kinds import EngineSpec
from weightbus.schemas.errors import WeightBusError

__all__ = ("DemoFailed", "Fleet", "open_fleet")

STOP_S = 20.0
"""How long a process may take to end in order."""

LOG_TAIL_LINES = 12
MAX_ANSWER_BYTES = 1 << 20
TRAINER: Final = "trainer"


class DemoFailed(WeightBusError):
    """The demo did not do what it promises; says which part, and what its log ends with."""

    def __init__(self, what: str, detail: str) -> None:
        self.what, self.detail = what, detail
        super().__init__(f"{what}: {detail}")


class Fleet:
    """The processes that run; made by `open_fleet`."""

    def __init__(self, directory: Path, nats_url: str, bus_prefix: str) -> None:
        self.directory = directory
        """Of everything that the processes leave on disk; removed at the end."""
        self._environment = {
            **{name: value for name, value in os.environ.items() if not _is_ours(name)},
            "WEIGHTBUS_NATS_URL": nats_url,
            "WEIGHTBUS_PREFIX": bus_prefix,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self._processes: dict[str, Process] = {}
        self._models: set[str] = set()
        self._answers: BufferedByteReceiveStream | None = None

    def engine_directory(self, engine: str) -> Path:
        """Where an engine's sockets are."""
        return self.directory / engine

    async def start_engine(self, spec: EngineSpec) -> None:
        """Start an engine and its consumer, as its kind does; they die with this process.

        Raises:
            DemoFailed: a process that must answer first has not.
        """
        self._models.add(spec.model)
        await spec.kind.start(self, spec)

    async def start(
        self, name: str, argv: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start a process that dies with this one; returns at once."""
        await self._start(name, guarded_command(argv), environment or {})

    def runs(self, name: str) -> bool:
        """Whether a process of this name was started, and not ended by us."""
        return name in self._processes

    async def start_trainer(self) -> None:
        """Start the trainer; returns at once."""
        trainer = await self._start(
            TRAINER, [sys.executable, "-m", "weightbus.cli.demo.trainer"], {}, answers=True
        )
        if trainer.stdout is not None:
            self._answers = BufferedByteReceiveStream(trainer.stdout)

    async def ask_trainer(self, command: bytes, deadline_s: float) -> bytes:
        """One command, one answer.

        Raises:
            DemoFailed: the trainer is gone, or did not answer in time.
        """
        trainer = self._processes[TRAINER]
        try:
            with anyio.fail_after(deadline_s):
                if trainer.stdin is None or self._answers is None:
                    raise DemoFailed(TRAINER, "has no pipes")
                await trainer.stdin.send(command + b"\n")
                return await self._answers.receive_until(b"\n", MAX_ANSWER_BYTES)
        except TimeoutError:
            raise DemoFailed(TRAINER, f"did not answer within {deadline_s:g} s") from None
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.IncompleteRead):
            raise DemoFailed(TRAINER, f"is gone: {self.log_tail(TRAINER)}") from None

    async def kill(self, engine: str) -> None:
        """SIGKILL a consumer, and the engine that hangs on it or belongs to it, all at once."""
        killed = [
            self._processes.pop(name)
            for name in tuple(self._processes)
            if name.partition(".")[0] == engine
        ]
        for process in killed:
            _kill(process)
        for process in killed:
            await process.wait()

    def check(self) -> None:
        """
        Raises:
            DemoFailed: a process has ended by itself.
        """
        for name, process in self._processes.items():
            if process.returncode is not None:
                raise DemoFailed(
                    name, f"ended with exit code {process.returncode}: {self.log_tail(name)}"
                )

    def log_tail(self, name: str) -> str:
        """The last lines that a process has printed."""
        text = (self.directory / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-LOG_TAIL_LINES:]) or "it printed nothing"

    async def stop(self) -> None:
        """End every process by the end of its input: consumers, servers, then the trainer."""
        trainer = self._processes.pop(TRAINER, None)
        await _end(process for name, process in self._processes.items() if "." not in name)
        await _end(process for name, process in self._processes.items() if "." in name)
        self._processes.clear()
        if trainer is not None:
            await _end([trainer])
        for model in sorted(self._models):  # a consumer that was killed has left its blocks
            await anyio.to_thread.run_sync(sweep_staging, model)

    async def _start(
        self,
        name: str,
        argv: Sequence[str],
        environment: Mapping[str, str],
        *,
        answers: bool = False,
    ) -> Process:
        with (self.directory / f"{name}.log").open("ab") as log:
            process = await anyio.open_process(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if answers else log,
                stderr=log,
                env={**self._environment, **environment},
                start_new_session=True,
            )
        self._processes[name] = process
        return process


def _is_ours(variable: str) -> bool:
    """Settings of some other bus, which the demo has nothing to do with."""
    return variable.startswith("WEIGHTBUS_")


def _kill(process: Process) -> None:
    """Kill what a guard guards, which leads a process group of its own; the guard ends with it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    with suppress(OSError):  # the guard, or what it guards, has ended
        for child in children.read_text().split():
            os.killpg(int(child), signal.SIGKILL)
            return
    with suppress(ProcessLookupError):
        process.kill()


async def _end(processes: Iterable[Process]) -> None:
    """Close their input; kill those that have not ended in time."""
    ending = list(processes)
    for process in ending:
        if process.stdin is not None:
            await process.stdin.aclose()
    with anyio.move_on_after(STOP_S):
        for process in ending:
            await process.wait()
    for process in ending:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@asynccontextmanager
async def open_fleet(directory: Path, nats_url: str, bus_prefix: str) -> AsyncIterator[Fleet]:
    """A fleet whose processes end with the context, also when that is cancelled."""
    fleet = Fleet(directory, nats_url, bus_prefix)
    try:
        yield fleet
    finally:
        with anyio.CancelScope(shield=True):
            await fleet.stop()
