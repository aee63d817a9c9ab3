"""Engines that outlive their consumers: processes of `weightbus engine`, shared by many tests.

Owns every engine that it started, each under a guard, so that none outlives the tests however they
end. An engine that a test leaves paused, written to, or without ranks is not given to the next one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio

from tests.integration.fleet.weights import ARCHITECTURE, CONFIG
from weightbus.bus.guard import guarded_command
from weightbus.consumers.engines.torch.client import open_torch_client
from weightbus.consumers.errors import ConsumerError

__all__ = ("EngineProcess", "Engines", "running_engines")

START_S = 120.0
END_S = 60.0
STATE_S = 15.0
POLL_S = 0.02


@dataclass(frozen=True)
class EngineProcess:
    """One engine that runs."""

    name: str
    directory: Path
    """Of its sockets."""
    ranks: int
    guard: subprocess.Popen[bytes]

    def wait_until_ready(self) -> None:
        log = self.directory.with_suffix(".log")
        give_up = time.monotonic() + START_S
        while b"is ready" not in log.read_bytes():
            if self.guard.poll() is not None or time.monotonic() > give_up:
                raise AssertionError(f"engine {self.name} did not start: {log.read_text()}")
            time.sleep(POLL_S)

    def end(self) -> None:
        """Its ranks are gone when this returns."""
        assert self.guard.stdin is not None
        self.guard.stdin.close()
        self.guard.wait(END_S)


class Engines:
    """The engines that run, by name."""

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        self._directory, self._device = directory, device
        self._running: dict[str, EngineProcess] = {}
        self._started = 0
        self._last_version = 0

    def next_version(self) -> int:
        """A version greater than any that an engine here has ever served."""
        self._last_version += 1
        return self._last_version

    def get(self, name: str, ranks: int = 1, first_gpu: int = 0) -> EngineProcess:
        """The engine of that name, ready; started if need be. Blocking.

        Args:
            first_gpu: of rank 0; the others follow. Nothing on CPUs.
        """
        engine = self._running.get(name)
        if engine is None:
            engine = self._running[name] = self._start(name, ranks, first_gpu)
            engine.wait_until_ready()
        assert engine.ranks == ranks, f"engine {name} has {engine.ranks} ranks"
        return engine

    async def inspect(self, names: set[str]) -> None:
        """End the engines among `names` that the next test cannot use."""
        for name in names & self._running.keys():
            if not await _is_well(self._running[name]):
                await anyio.to_thread.run_sync(self.end, name)

    def end(self, name: str) -> None:
        """Blocking."""
        engine = self._running.pop(name)
        engine.end()
        assert _processes_of(engine.directory) == [], f"processes of engine {name} are left"

    def end_all(self) -> None:
        for name in tuple(self._running):
            self.end(name)

    def _start(self, name: str, ranks: int, first_gpu: int) -> EngineProcess:
        self._started += 1
        directory = self._directory / f"{name}{self._started}"
        directory.mkdir(mode=0o700)
        arguments = {
            "--architecture": ARCHITECTURE,
            "--config": json.dumps(CONFIG),
            "--tp": str(ranks),
            "--device": f"{self._device}:{first_gpu}" if first_gpu else self._device,
            "--dir": str(directory),
        }
        command = [sys.executable, "-m", "weightbus", "engine"]
        command += [word for pair in arguments.items() for word in pair]
        with directory.with_suffix(".log").open("wb") as log:
            guard = subprocess.Popen(
                guarded_command(command),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return EngineProcess(name, directory, ranks, guard)


@contextmanager
def running_engines(device: str = "cpu") -> Iterator[Engines]:
    """Engines are started when they are first asked for, and end here."""
    directory = Path(tempfile.mkdtemp(prefix="wb-"))  # short: it holds the paths of sockets
    engines = Engines(directory, device)
    try:
        yield engines
    finally:
        engines.end_all()
        shutil.rmtree(directory)


async def _is_well(engine: EngineProcess) -> bool:
    """It serves some version, or has never had one."""
    try:
        async with open_torch_client(engine.directory) as client:
            state = await client.state(STATE_S)
    except ConsumerError:
        return False
    serves = not state.paused or state.version < 0
    return state.ready and serves and not state.touched


def _processes_of(directory: Path) -> list[int]:
    """Process ids of whoever names a directory in its command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        if str(directory).encode() in command:
            found.append(int(process.name))
    return found
