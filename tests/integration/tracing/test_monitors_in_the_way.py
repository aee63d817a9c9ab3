"""Updates of a real fleet while monitors that are slow, stopped or broken hang on the same bus."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.abc import Process, TaskStatus
from anyio.streams.buffered import BufferedByteReceiveStream

from tests.integration.bus.processes import halt
from tests.integration.fleet.fleet import Fleet
from tests.integration.fleet.log import DEADLINE_S
from tests.integration.tracing import monitor_process
from weightbus.bus.background import open_background
from weightbus.bus.connection import open_bus
from weightbus.bus.monitor import CaughtUp, open_monitor
from weightbus.bus.received import Received
from weightbus.schemas.progress import UpdateComplete, UpdateFailed

pytestmark = pytest.mark.anyio

SLOW_MONITORS = 8
VERSIONS = 3


class Slow:
    """Takes one message, and the next only when it is released."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.stands_still, self.released = anyio.Event(), anyio.Event()
        self.versions: list[int] = []

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        fleet = self._fleet
        async with (
            open_bus(fleet.settings) as bus,
            open_monitor(bus, model=fleet.model, engines=False) as monitor,
        ):
            assert await anext(monitor) == CaughtUp()
            task_status.started()
            async for event in monitor:
                assert isinstance(event, Received), "nothing was missed"
                if isinstance(event.message, UpdateComplete):
                    self.versions.append(event.message.version)
                self.stands_still.set()
                await self.released.wait()


class Stopped:
    """A monitor in a process of its own that does not run."""

    def __init__(self, process: Process) -> None:
        assert process.stdout is not None
        self.process = process
        self._lines = BufferedByteReceiveStream(process.stdout)

    async def line(self) -> str:
        with anyio.fail_after(DEADLINE_S):
            return (await self._lines.receive_until(b"\n", 4096)).decode()


@asynccontextmanager
async def stopped_monitor(fleet: Fleet) -> AsyncIterator[Stopped]:
    """Entered once it has begun to watch, and stands still."""
    argv = [sys.executable, "-m", monitor_process.__name__, fleet.server.url, fleet.model]
    async with await anyio.open_process(argv, stdin=subprocess.DEVNULL, stderr=None) as process:
        try:
            monitor = Stopped(process)
            assert await monitor.line() == monitor_process.WATCHING
            halt(process.pid)
            yield monitor
        finally:
            process.kill()


async def crash_again_and_again(fleet: Fleet, crashes: list[int]) -> None:
    """As an operator's script that is started again whenever it fails."""
    async with open_bus(fleet.settings) as bus:
        while True:
            try:
                async with open_monitor(bus, model=fleet.model) as monitor:
                    async for event in monitor:
                        if isinstance(event, Received):
                            raise ZeroDivisionError
            except ZeroDivisionError:
                crashes.append(1)


async def test_updates_go_through_and_are_told_later_when_monitors_stand_still(
    fleet: Fleet,
) -> None:
    """Nothing that an update does can wait for them: they go on only after all of them are over."""
    slow = [Slow(fleet) for _ in range(SLOW_MONITORS)]
    crashes: list[int] = []
    async with (
        fleet.follow("a") as a,
        fleet.follow("b") as b,
        fleet.publisher() as trainer,
        stopped_monitor(fleet) as stopped,
        open_background() as tasks,
    ):
        for monitor in slow:
            await tasks.start(monitor.run)
        tasks.start_soon(crash_again_and_again, fleet, crashes)
        published = []
        for _ in range(VERSIONS):
            version = (await trainer.publish()).version
            published += [version, version]
            for follower in (a, b):
                await follower.completes(version)
        assert all(m.stands_still.is_set() and not m.released.is_set() for m in slow)
        assert len(crashes) > 0
        assert fleet.log.said(UpdateFailed) == []

        stopped.process.send_signal(signal.SIGCONT)
        for monitor in slow:
            monitor.released.set()
        assert [int(await stopped.line()) for _ in published] == published

        async def all_are_told() -> bool:
            return all(monitor.versions == published for monitor in slow)

        await fleet.eventually("all updates are told", all_are_told)
