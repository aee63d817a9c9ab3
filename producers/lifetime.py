"""From when a publisher is open until its slots are free: one publication at a time, and the end.

Owns whether a publisher is closed, and what it publishes at the moment.
Invariants: nothing is published after the end; no wait at the end is without a limit; a slot that a
device still writes is left to it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread

from weightbus.bus.errors import BusTimeout
from weightbus.producers.announcing import Announcer
from weightbus.producers.errors import NotServed, PublisherClosed
from weightbus.producers.measuring import Measures
from weightbus.producers.memory import keep
from weightbus.producers.options import PublisherOptions
from weightbus.producers.serving import wait_until_served
from weightbus.producers.slots import Slots

__all__ = ("Lifetime",)

_logger = logging.getLogger(__name__)

CLOSE_GRACE_S = 10.0
"""For the bus to answer, at the end, beside the wait for readers; and before that for a publication
that is cancelled to end."""

FREE_TIMEOUT_S = 10.0
"""For the system and the driver to free the slots."""


class Lifetime:
    """Of one rank's publisher."""

    def __init__(
        self,
        announcer: Announcer,
        slots: Slots,
        measures: Measures,
        options: PublisherOptions,
    ) -> None:
        self.one_at_a_time = anyio.Lock()
        """Held by what is published; to be held for what must not come between."""
        self._announcer, self._model = announcer, announcer.model
        self._slots, self._measures, self._options = slots, measures, options
        self._running: anyio.CancelScope | None = None
        self._closed = False

    def check_open(self) -> None:
        """
        Raises:
            PublisherClosed
        """
        if self._closed:
            raise PublisherClosed(self._model)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """One at a time; what still runs when the publisher ends is cancelled.

        Raises:
            PublisherClosed: it was, or comes after the end.
        """
        async with self.one_at_a_time:
            self.check_open()
            try:
                with anyio.CancelScope() as self._running:
                    yield
                if self._running.cancelled_caught:
                    raise PublisherClosed(self._model)
            finally:
                self._running = None
                if self._slots.has_ended:  # which left out what was written
                    await self._free_slots()

    async def linger(self) -> None:
        """Let what is published in the background be announced, and engines come to the newest.

        Raises:
            BusUnavailable, BusTimeout, RequestRefused
        """
        with anyio.move_on_after(self._options.linger_s + CLOSE_GRACE_S) as background:
            async with self.one_at_a_time:
                pass
        if background.cancelled_caught:
            return
        timeout_s = self._options.linger_s
        with anyio.move_on_after(timeout_s + CLOSE_GRACE_S if timeout_s > 0 else 0):
            newest = await self._announcer.newest()
            try:
                await wait_until_served(
                    self._announcer.bus, self._model, newest, engines=0, timeout_s=timeout_s
                )
            except NotServed as error:
                _logger.warning("at the end of its publisher: %s", error)

    async def close(self) -> None:
        """End what is published, retire what was, and free the slots.

        Raises:
            BusUnavailable, BusTimeout, RequestRefused: the slots are freed all the same.
        """
        self._closed = True
        await self._end_running()
        timeout_s = self._options.close_wait_s + CLOSE_GRACE_S
        try:
            with anyio.fail_after(timeout_s, shield=True):
                if self._slots.written:
                    await self._announcer.newest()
                    await self._slots.retire_all(self._options.close_wait_s)
        except TimeoutError:
            raise BusTimeout(f"retiring the versions of {self._model}", timeout_s) from None
        finally:
            await self._free_slots()

    async def _end_running(self) -> None:
        """Cancel what is published. A device can hold it up: then its slot is left to it."""
        if self._running is not None:
            self._running.cancel()
        with anyio.move_on_after(CLOSE_GRACE_S, shield=True) as waiting:
            async with self.one_at_a_time:
                return
        if waiting.cancelled_caught:
            _logger.warning(
                "a publication of %s has not ended within %g s: its slot is removed when it has",
                self._model,
                CLOSE_GRACE_S,
            )

    async def _free_slots(self) -> None:
        """In a thread: the driver may not answer, and then its blocks stay with this process."""
        remove = self._slots.end()
        with anyio.move_on_after(FREE_TIMEOUT_S, shield=True) as waiting:
            try:
                await anyio.to_thread.run_sync(remove, abandon_on_cancel=True)
            except RuntimeError:  # no new thread: the interpreter exits
                remove()
        self._measures.freed()
        if waiting.cancelled_caught:
            keep(remove)
            _logger.warning(
                "slots of %s were not freed within %g s: they stay", self._model, FREE_TIMEOUT_S
            )
