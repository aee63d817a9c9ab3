"""Lets requests through one at a time, and none while the weights change. Does no I/O.

Invariants:
    At most one request is inside, and none while the gate is closed.
    Requests enter in the order they came; at most `max_waiting` wait, each until its own deadline.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from weightbus.consumers.engines.errors import RequestRefused
from weightbus.consumers.errors import DeadlineExceeded

__all__ = ("Gate",)


class Gate:
    """Closed at first, and on no version."""

    def __init__(self, max_waiting: int) -> None:
        self.version = -1
        """What requests run on, or last ran on; -1: nothing from the bus."""
        self.waiting = 0
        """Requests that wait to be let in."""
        self._max_waiting = max_waiting
        self._turn = anyio.Lock()
        self._opened = anyio.Event()
        self._left = anyio.Event()
        self._left.set()

    @property
    def closed(self) -> bool:
        """Whether requests wait."""
        return not self._opened.is_set()

    @asynccontextmanager
    async def enter(self, deadline_s: float) -> AsyncIterator[None]:
        """Wait to be let in; the request is inside while the context is open.

        Raises:
            RequestRefused: too many wait already.
            DeadlineExceeded: it was not let in within `deadline_s`.
        """
        if self.waiting >= self._max_waiting:
            raise RequestRefused("requests that wait", self.waiting, "no more are taken")
        inside = False
        self.waiting += 1
        try:
            with anyio.move_on_after(deadline_s):
                await self._turn.acquire()
                try:
                    while self.closed:
                        await self._opened.wait()
                    inside = True
                finally:
                    if not inside:
                        self._turn.release()
        finally:
            self.waiting -= 1
        if not inside:
            why = "the engine is paused" if self.closed else "others are before it"
            raise DeadlineExceeded(f"waiting of a request ({why})", deadline_s)
        self._left = anyio.Event()
        try:
            yield
        finally:
            self._left.set()
            self._turn.release()

    async def close(self) -> None:
        """Let nobody in any more; returns when nobody is inside. If cancelled, all is as before."""
        was_closed = self.closed
        self.close_nowait()
        closed, emptied = self._opened, False
        try:
            await self._left.wait()
            emptied = True
        finally:
            if not emptied and not was_closed and self._opened is closed:
                self._opened.set()

    def close_nowait(self) -> None:
        """Let nobody in any more; one may still be inside."""
        if not self.closed:
            self._opened = anyio.Event()

    def open(self, version: int) -> None:
        """Let requests in; they run on `version`."""
        self.version = version
        self._opened.set()

    def reset(self) -> None:
        """Close, on no version: what was served is gone."""
        waited_for, self._opened = self._opened, anyio.Event()
        waited_for.set()  # who waits looks again, and waits on
        self.version = -1
