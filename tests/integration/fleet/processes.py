"""Consumers and trainers in processes of their own, for tests that kill them.

Owns each process while its context is open: it ends with the context, and with the tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import msgspec
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from tests.integration.fleet import consumer, trainer
from tests.integration.fleet.fleet import PRESENCE_TTL_S, Fleet
from tests.integration.fleet.held import Moment
from tests.integration.fleet.log import DEADLINE_S
from tests.integration.fleet.weights import ARCHITECTURE, CONFIG
from weightbus.producers.publisher import PublisherOptions

__all__ = ("Child", "consume_beside", "consume_command", "consumer_process", "trainer_process")

ROOT = Path(__file__).parents[3]
MAX_LINE_BYTES = 1 << 16


Within = Callable[[Sequence[str]], Sequence[str]]
"""Makes a command line one that runs somewhere else."""


def _as_it_is(argv: Sequence[str]) -> Sequence[str]:
    return argv


class Child:
    """A process that reports on its stdout."""

    def __init__(self, process: Process) -> None:
        assert process.stdout is not None
        self._process = process
        self._lines = BufferedByteReceiveStream(process.stdout)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def report(self) -> str:
        """Its next report."""
        with anyio.move_on_after(DEADLINE_S):
            try:
                return (await self._lines.receive_until(b"\n", MAX_LINE_BYTES)).decode()
            except (anyio.EndOfStream, anyio.IncompleteRead):
                raise AssertionError(f"it ended with {await self._process.wait()}") from None
        raise AssertionError(f"it said nothing within {DEADLINE_S:g} s")

    async def hears(self, word: str) -> None:
        """Wait for its next report, which must be this one."""
        assert await self.report() == word

    async def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send(line.encode() + b"\n")

    def go_on(self) -> None:
        """End a consumer's hold."""
        self._process.send_signal(signal.SIGUSR1)

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def end(self) -> None:
        """Close its stdin; returns when it is gone, in whatever way."""
        assert self._process.stdin is not None
        await self._process.stdin.aclose()
        with anyio.move_on_after(DEADLINE_S):
            await self._process.wait()

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal; returns its exit code."""
        self._process.send_signal(number)
        with anyio.move_on_after(DEADLINE_S):
            return await self._process.wait()
        raise AssertionError(f"it did not end within {DEADLINE_S:g} s of {number.name}")


@asynccontextmanager
async def consumer_process(
    fleet: Fleet, name: str, *, ranks: int = 1, hold: Moment | None = None, **changes: Any
) -> AsyncIterator[Child]:
    """A consumer beside the engine `name`; entered once it follows."""
    engine = await fleet.engine(name, ranks)
    arguments = consumer.Arguments(
        url=fleet.server.url,
        presence_ttl_s=PRESENCE_TTL_S,
        config=fleet.config(name, **changes),
        directory=str(engine.directory),
        hold=hold,
    )
    async with _child(consumer.__name__, msgspec.json.encode(arguments).decode()) as child:
        await child.hears(consumer.FOLLOWING)
        yield child


@asynccontextmanager
async def consume_command(fleet: Fleet, name: str, directory: Path) -> AsyncIterator[Child]:
    """`weightbus consume` with an engine of its own; entered once it follows."""
    options = {
        "--engine-dir": str(directory),
        "--architecture": ARCHITECTURE,
        "--config": json.dumps(CONFIG),
    }
    async with _consume(fleet, name, options, _as_it_is) as child:
        yield child


@asynccontextmanager
async def consume_beside(
    fleet: Fleet, name: str, options: Mapping[str, str], within: Within
) -> AsyncIterator[Child]:
    """`weightbus consume` beside the engine `name`, somewhere else; entered once it follows."""
    engine = await fleet.engine(name)
    options = {"--engine-dir": str(engine.directory), **options}
    async with _consume(fleet, name, options, within) as child:
        yield child


@asynccontextmanager
async def _consume(
    fleet: Fleet, name: str, options: Mapping[str, str], within: Within
) -> AsyncIterator[Child]:
    common = {"--model": fleet.model, "--engine-id": name, "--nats": fleet.server.url}
    words = [word for option in (common | dict(options)).items() for word in option]
    async with _child("weightbus", "consume", *words, within=within) as child:
        while f"follows {fleet.model}" not in await child.report():
            pass  # the transfer engine prints what it likes
        yield child


@asynccontextmanager
async def trainer_process(
    fleet: Fleet, *, filled: bool = False, **options: Any
) -> AsyncIterator[Child]:
    """A trainer that publishes the version that it is told, and then says `published`.

    `filled`: every version holds the filler, too, so that moving it takes its time.
    """
    arguments = trainer.Arguments(
        url=fleet.server.url,
        model=fleet.model,
        filled=filled,
        options=PublisherOptions(**options),
    )
    async with _child(trainer.__name__, msgspec.json.encode(arguments).decode()) as child:
        await child.hears(trainer.OPEN)
        yield child
        await child.end()


@asynccontextmanager
async def _child(module: str, *arguments: str, within: Within = _as_it_is) -> AsyncIterator[Child]:
    """Its stdin is a pipe that we hold: who reads its end knows that the tests are gone."""
    process = await anyio.open_process(
        within([sys.executable, "-m", module, *arguments]),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    child = Child(process)
    try:
        yield child
    finally:
        with anyio.CancelScope(shield=True):
            await child.kill()
