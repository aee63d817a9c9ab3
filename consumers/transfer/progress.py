"""Whether a call gets on: how long it takes depends on its size, how long it may stand still not.

Owns nothing. The call's threads say when they have brought something; the event loop looks.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import anyio

from weightbus.consumers.errors import DeadlineExceeded
from weightbus.schemas.errors import WeightBusError

__all__ = ("STEP_BYTES", "Progress", "run_while_moving")

STEP_BYTES: Final = 16 * 2**20
"""Brought at a time: after each step a call says that it gets on, and looks whether anybody still
waits for it. At the usual `stall_s` of 10 s a link must carry 1.6 MiB/s per read, no more."""


class Progress:
    """When one call last got on."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()
        self._at_work = 0

    def made(self) -> None:
        """Some step has ended. Called by any thread."""
        self._last_s = time.monotonic()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Only while some part of the call is in here can it stand still: before, it waits for its
        turn. For the event loop."""
        self.made()
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1
            self.made()

    def left_s(self, stall_s: float) -> float:
        """How long it may stand still yet, from now; 0 or less: too long already."""
        if not self._at_work:
            return stall_s
        return self._last_s + stall_s - time.monotonic()


async def run_while_moving(
    function: Callable[[], Awaitable[None]],
    progress: Progress,
    stall_s: float,
    what: Callable[[], str],
) -> None:
    """Run it for as long as it gets on; a call that stands still is cancelled.

    Args:
        what: names the call, once it has failed.

    Raises:
        DeadlineExceeded: it has made no progress for `stall_s`.
        WeightBusError: of the function.
    """
    failures: list[WeightBusError] = []

    async def watch() -> None:
        left_s = stall_s
        while left_s > 0:
            await anyio.sleep(left_s)
            left_s = progress.left_s(stall_s)
        failures.append(DeadlineExceeded(what(), stall_s))
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        try:
            await function()
        except WeightBusError as error:
            failures.append(error)
        else:
            failures.clear()  # it has ended, in the very moment in which it was given up
        tasks.cancel_scope.cancel()
    if failures:
        raise failures[0]
