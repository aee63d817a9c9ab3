"""Named timers: each fires once, a new one replaces its namesake."""

from __future__ import annotations

import anyio
import pytest

from weightbus.consumers.round.instructions import SetTimer
from weightbus.consumers.timers import Timers

pytestmark = pytest.mark.anyio

FAR_NS = 10**18
NEAR_NS = 10**6


class Clock:
    """Timers by a clock that stands still at 0, and what they fired."""

    def __init__(self, tasks: anyio.abc.TaskGroup) -> None:
        self.fired: list[tuple[str, int]] = []
        self._more = anyio.Event()
        self.timers = Timers(tasks, lambda: 0, self._fire)

    def set(self, name: str, token: int, at_ns: int) -> None:
        self.timers.set_nowait(SetTimer(name, token, at_ns))

    def _fire(self, name: str, token: int) -> None:
        self.fired.append((name, token))
        self._more.set()

    async def next(self) -> None:
        """Wait until something has fired since."""
        await self._more.wait()
        self._more = anyio.Event()


async def test_timers_fire_in_the_order_of_their_times_each_once() -> None:
    async with anyio.create_task_group() as tasks:
        clock = Clock(tasks)
        clock.set("later", 1, 50 * NEAR_NS)
        clock.set("soon", 2, NEAR_NS)
        clock.set("past", 3, -FAR_NS)
        while len(clock.fired) < 3:
            await clock.next()
    assert clock.fired == [("past", 3), ("soon", 2), ("later", 1)]


async def test_timer_is_forgotten_when_its_namesake_is_set_or_it_is_cancelled() -> None:
    async with anyio.create_task_group() as tasks:
        clock = Clock(tasks)
        clock.set("replaced", 1, NEAR_NS)
        clock.set("replaced", 2, 2 * NEAR_NS)
        clock.set("cancelled", 3, NEAR_NS)
        clock.timers.cancel_nowait("cancelled")
        clock.timers.cancel_nowait("never set")
        clock.set("far", 4, FAR_NS)
        await clock.next()
        clock.timers.cancel_nowait("far")
    assert clock.fired == [("replaced", 2)]


async def test_timer_can_be_set_again_when_it_has_fired() -> None:
    async with anyio.create_task_group() as tasks:
        clock = Clock(tasks)
        for token in (1, 2):
            clock.set("again", token, 0)
            await clock.next()
    assert clock.fired == [("again", 1), ("again", 2)]
