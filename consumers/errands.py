"""Requests to the bus that must keep their order, and that outlive a slow bus.

Owns the queue; `run` owns the sending. Whoever asks for an errand repeats it by a timer of its own,
so a refusal or a missing answer is told and outlived; only a bus that is gone for good ends the
service.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from weightbus.bus.errors import BusError, BusUnavailable

__all__ = ("Errands", "keep_on")

_logger = logging.getLogger(__name__)

T = TypeVar("T")
Errand = Callable[[], Awaitable[None]]


class Errands:
    """Takes requests at once, runs them one after the other in the background."""

    def __init__(self) -> None:
        self._taken: MemoryObjectSendStream[Errand]
        self._waiting: MemoryObjectReceiveStream[Errand]
        self._taken, self._waiting = anyio.create_memory_object_stream(math.inf)

    def take_nowait(self, errand: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Run it after all that were taken before."""
        self._taken.send_nowait(lambda: errand(*arguments))

    async def run(self) -> None:
        """Run errands until cancelled.

        Raises:
            BusUnavailable: the bus is gone for good.
        """
        async for errand in self._waiting:
            await keep_on(errand())

    async def wait_done(self, deadline_s: float) -> bool:
        """Wait until everything that was taken before is done; False if the deadline came first.
        Only while `run` runs."""
        done = anyio.Event()

        async def note() -> None:
            done.set()

        self.take_nowait(note)
        with anyio.move_on_after(deadline_s):
            await done.wait()
        return done.is_set()


async def keep_on(request: Awaitable[T]) -> T | None:
    """A request to the bus that will be repeated anyway: a refusal is told and outlived (None).

    Raises:
        BusUnavailable: the bus is gone for good.
    """
    try:
        return await request
    except BusUnavailable:
        raise
    except BusError as error:
        _logger.warning("%s: %s", type(error).__name__, error)
        return None
