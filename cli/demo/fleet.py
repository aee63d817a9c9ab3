"""The processes of the demo: one trainer, and a consumer with its engine per engine id.

Owns every process it starts, each in a session of its own, with its output in a log file; leaving
`open_fleet` ends them all, in order if they can, by force if they must.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from msgspec import Struct

from weightbus.bus.guard import guarded_command
from weightbus.bus.sweep import sweep_staging
from weightbus.schemas.errors import WeightBusError

__all__ = ("DemoFailed", "EngineSpec", "Fleet", "open_fleet")

STOP_S = 20.0
"""How long a process may take to end in order."""

JOIN_WINDOW_S = 1.0
"""How long a leader waits for an engine that is present: small machines are slow."""

LOG_TAIL_LINES = 12
MAX_ANSWER_BYTES = 1 << 20


class DemoFailed(WeightBusError):
    """The demo did not do what it promises; says which part, and what its log ends with."""

    def __init__(self, what: str, detail: str) -> None:
        self.what, self.detail = what, detail
        super().__init__(f"{what}: {detail}")


class EngineSpec(Struct, frozen=True, kw_only=True):
    """One engine of the demo."""

    engine: str
    model: str
    architecture: str
    config: Mapping[str, Any] = {}
    ranks: int = 1
    host: str = ""
    """Host id of its own, as if it were another machine; empty: this host's."""


class Fleet:
    """The processes that run; made by `open_fleet`."""

    def __init__(self, directory: Path, nats_url: str, bus_prefix: str) -> None:
        self._directory = directory
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
        return self._directory / engine

    async def start_engine(self, spec: EngineSpec) -> None:
        """Start a consumer that starts its engine; returns at once. Both die with this process."""
        self._models.add(spec.model)
        consume = [
            *(sys.executable, "-m", "weightbus", "consume"),
            *("--model", spec.model, "--engine-id", spec.engine),
            *("--engine-dir", str(self.engine_directory(spec.engine))),
            *("--architecture", spec.architecture, "--tp", str(spec.ranks)),
            *("--config", msgspec.json.encode(spec.config).decode()),
            *("--join-window", str(JOIN_WINDOW_S)),
            *(("--host-id", spec.host) if spec.host else ()),
        ]
        await self._start(spec.engine, guarded_command(consume))

    async def start_trainer(self) -> None:
        """Start the trainer; returns at once."""
        trainer = await self._start(
            "trainer", [sys.executable, "-m", "weightbus.cli.demo.trainer"], answers=True
        )
        if trainer.stdout is not None:
            self._answers = BufferedByteReceiveStream(trainer.stdout)

    async def ask_trainer(self, command: bytes, deadline_s: float) -> bytes:
        """One command, one answer.

        Raises:
            DemoFailed: the trainer is gone, or did not answer in time.
        """
        trainer = self._processes["trainer"]
        try:
            with anyio.fail_after(deadline_s):
                if trainer.stdin is None or self._answers is None:
                    raise DemoFailed("trainer", "has no pipes")
                await trainer.stdin.send(command + b"\n")
                return await self._answers.receive_until(b"\n", MAX_ANSWER_BYTES)
        except TimeoutError:
            raise DemoFailed("trainer", f"did not answer within {deadline_s:g} s") from None
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.IncompleteRead):
            raise DemoFailed("trainer", f"is gone: {self.log_tail('trainer')}") from None

    async def kill(self, name: str) -> None:
        """SIGKILL a process, and with a consumer the engine that hangs on it."""
        process = self._processes.pop(name)
        with suppress(ProcessLookupError):
            process.kill()
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
        text = (self._directory / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-LOG_TAIL_LINES:]) or "it printed nothing"

    async def stop(self) -> None:
        """End every process by the end of its input: the engines', then the trainer."""
        trainer = self._processes.pop("trainer", None)
        await _end(list(self._processes.values()))
        if trainer is not None:
            await _end([trainer])
        for model in sorted(self._models):  # a consumer that was killed has left its blocks
            await anyio.to_thread.run_sync(sweep_staging, model)

    async def _start(self, name: str, argv: Sequence[str], *, answers: bool = False) -> Process:
        with (self._directory / f"{name}.log").open("ab") as log:
            process = await anyio.open_process(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if answers else log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        self._processes[name] = process
        return process


def _is_ours(variable: str) -> bool:
    """Settings of some other bus, which the demo has nothing to do with."""
    return variable.startswith("WEIGHTBUS_")


async def _end(processes: Sequence[Process]) -> None:
    """Close their input; kill those that have not ended in time."""
    for process in processes:
        if process.stdin is not None:
            await process.stdin.aclose()
    with anyio.move_on_after(STOP_S):
        for process in processes:
            await process.wait()
    for process in processes:
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
