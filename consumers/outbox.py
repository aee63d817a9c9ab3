"""What a consumer still has to say: two queues to the bus, so that progress never delays control.

Owns the queues and, while `run` runs, the sending. Invariants: control messages leave in their
order and are said again until the bus has them or is given up (`BusUnavailable` ends the service);
progress is bounded, and what does not fit or is not taken is counted, never waited for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Final

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from weightbus.bus.connection import Bus
from weightbus.bus.errors import BusTimeout, BusUnavailable, RequestRefused
from weightbus.schemas.base import Message
from weightbus.schemas.errors import WeightBusError

__all__ = ("Outbox",)

PROGRESS_KEPT: Final = 10_000
"""Progress messages that wait to be sent; about 5 MB, or 330 MB if all told `BUCKETS_SAID`."""

AGAIN_S: Final = 0.2
"""Pause before something is said again."""

_logger = logging.getLogger(__name__)

Letter = tuple[Message, Mapping[str, str]]
Sender = MemoryObjectSendStream[Letter]
Receiver = MemoryObjectReceiveStream[Letter]


def _tell_nobody(message: Message) -> None:
    """Nobody wants to know."""


class Outbox:
    """Takes messages at once, sends them in the background."""

    def __init__(self, bus: Bus, tell: Callable[[Message], None] = _tell_nobody) -> None:
        """`tell` is called with every message, after it was taken; it neither waits nor raises."""
        self._bus = bus
        self._tell = tell
        self._control_in: Sender
        self._control_out: Receiver
        self._control_in, self._control_out = anyio.create_memory_object_stream(math.inf)
        self._progress_in: Sender
        self._progress_out: Receiver
        self._progress_in, self._progress_out = anyio.create_memory_object_stream(PROGRESS_KEPT)
        self._unsent = 0
        self._empty = anyio.Event()
        self.progress_lost = 0
        """Progress messages that were dropped, so far."""

    def say_nowait(self, message: Message, headers: Mapping[str, str]) -> None:
        """Send a message that others act on."""
        self._control_in.send_nowait((message, headers))
        self._count(1)
        self._tell(message)

    def report_nowait(self, message: Message, headers: Mapping[str, str]) -> None:
        """Send a message that only monitors read."""
        try:
            self._progress_in.send_nowait((message, headers))
        except anyio.WouldBlock:
            self.progress_lost += 1
        else:
            self._count(1)
        self._tell(message)

    async def run(self) -> None:
        """Send until cancelled.

        Raises, in an exception group:
            BusUnavailable: the bus did not come back in its stated time.
            PayloadTooLarge, MessageInvalid: what others act on cannot be said.
        """
        async with anyio.create_task_group() as group:
            group.start_soon(self._run_control)
            group.start_soon(self._run_progress)

    async def drain(self, deadline_s: float) -> bool:
        """Wait until everything is sent; False if the deadline came first."""
        if self._unsent:
            with anyio.move_on_after(deadline_s):
                await self._empty.wait()
        return not self._unsent

    def _count(self, more: int) -> None:
        self._unsent += more
        if not self._unsent:
            self._empty.set()
            self._empty = anyio.Event()

    async def _run_control(self) -> None:
        async for message, headers in self._control_out:
            while True:
                try:
                    await self._bus.publish(message, headers=headers)
                except (BusTimeout, RequestRefused) as error:
                    _logger.warning("said again: %s: %s", type(message).__name__, error)
                    await anyio.sleep(AGAIN_S)
                else:
                    break
            self._count(-1)

    async def _run_progress(self) -> None:
        async for message, headers in self._progress_out:
            try:
                await self._bus.publish(message, headers=headers)
            except BusUnavailable:
                raise
            except WeightBusError as error:
                self.progress_lost += 1
                _logger.warning("lost: %s: %s", type(message).__name__, error)
            self._count(-1)
