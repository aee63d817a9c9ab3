"""From the bus to the board, for as long as the page is served, through any loss of the bus.

Owns the connection. It only reads: no update knows of it. After a loss it asks for what it missed;
a connection that is lost for good is opened again, and again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import anyio
import anyio.abc

from weightbus.bus.clock import BusClock
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.errors import BusError, BusUnavailable
from weightbus.bus.monitor import CaughtUp, Missed, Monitor, MonitorEvent, open_monitor
from weightbus.bus.presence import EngineGone
from weightbus.bus.received import Received
from weightbus.bus.settings import BusSettings
from weightbus.cli.monitoring import looked_back
from weightbus.cli.ui.board import Board
from weightbus.cli.ui.rounds import KnownRound
from weightbus.schemas.base import Message
from weightbus.schemas.catalogue import MONITORED
from weightbus.schemas.progress import EngineState
from weightbus.tracing.history import Told, build_waterfall
from weightbus.tracing.text import NS_PER_S
from weightbus.tracing.waterfall import Waterfall

__all__ = ("Feed",)

OVERLAP_S: Final = 5
"""How much is read again when a connection is opened anew: repeats do no harm."""

LATE_S: Final = 60
"""How long after the last message that we know of a round more of it is looked for."""

REFRESH_S: Final = 0.25
"""Pages are told of changes this often at most."""

TRY_AGAIN_S: Final = 1.0
"""After a connection could not be opened again."""


class Feed:
    """Feeds a board; `run` is its task."""

    def __init__(self, settings: BusSettings, model: str | None) -> None:
        self.board = Board(model)
        self._settings, self._model = settings, model
        self._bus: Bus | None = None
        self._clock: BusClock
        """Of the last connection; it goes on while there is none."""
        self._heard_ns = 0
        """Until when we have listened, by the bus's clock; 0: not yet."""
        self._reading = anyio.Lock()

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Started once the bus has been reached and looked back; then runs until cancelled.

        Raises:
            BusError: the bus cannot be reached at the start.
        """
        is_started = False

        def started() -> None:
            nonlocal is_started
            if not is_started:
                is_started = True
                task_status.started()

        while True:
            try:
                async with open_bus(self._settings) as self._bus:
                    await self._follow(self._bus, started)
            except* BusError as errors:
                if not is_started:
                    raise
                self.board.lose(self._clock.now_ns(), _first(errors))
            finally:
                self._bus = None
            await anyio.sleep(TRY_AGAIN_S)

    def now_ns(self) -> int:
        """What time it is on the bus."""
        return self._clock.now_ns()

    async def waterfall(self, model: str, round_id: str) -> Waterfall | None:
        """Of one round; None: neither we nor the bus remember it.

        Raises:
            BusError: it must be read back from the bus, and cannot be now.
        """
        known = self.board.log.find(model, round_id)
        if known is None:
            return None
        history: list[Told] = [*known.messages]
        if not known.is_whole:
            history += await self._read_back(model, round_id, known)
        return await anyio.to_thread.run_sync(build_waterfall, model, round_id, history)

    async def _read_back(self, model: str, round_id: str, known: KnownRound) -> list[Told]:
        """One round at a time: what a page asks for must not become a load for the bus."""
        bus = self._bus
        if bus is None or not bus.is_connected:
            raise BusUnavailable(self.board.url, "lost, and tried for")
        until_ns = known.last_ns + LATE_S * NS_PER_S
        found: list[Told] = []
        history = bus.replay(*MONITORED, model=model, since_ns=known.first_ns, is_answered=False)
        async with self._reading:
            async for received in history:
                if received.received_ns > until_ns:
                    break
                if getattr(received.message, "round", None) == round_id:
                    found.append(received)
        return found

    async def _follow(self, bus: Bus, started: Callable[[], None]) -> None:
        """Until the connection is lost for good."""
        self._clock = bus.clock
        is_back = self._heard_ns > 0
        if not is_back:
            await self._look_back(bus)
        since_ns = self._heard_ns - OVERLAP_S * NS_PER_S
        async with (
            open_monitor(bus, model=self._model, since_ns=since_ns) as monitor,
            anyio.create_task_group() as tasks,
        ):
            async for event in monitor:
                self._take(event)
                if isinstance(event, CaughtUp):
                    self._refresh(bus, monitor)
                    started()
                    tasks.start_soon(self._keep_fresh, bus, monitor)
                    if is_back:
                        tasks.start_soon(self._sweep_engines, bus)

    async def _look_back(self, bus: Bus) -> None:
        """At the start: the newest versions, and the rounds without their stages."""
        self._heard_ns = bus.clock.now_ns()
        async for told in looked_back(bus, MONITORED, self._model):
            self._feed(told, is_heard=False)

    def _take(self, event: MonitorEvent[Message]) -> None:
        match event:
            case Received():
                self._feed(event, is_heard=True)
            case EngineState():
                self.board.feed(event, self._clock.now_ns(), {}, is_heard=True)
            case EngineGone():
                self.board.feed_gone(event.model, event.engine)
            case Missed():
                self.board.log.forget_messages()

    def _feed(self, received: Received[Message], *, is_heard: bool) -> None:
        self.board.feed(received.message, received.received_ns, received.headers, is_heard=is_heard)
        self._heard_ns = max(self._heard_ns, received.received_ns)

    async def _sweep_engines(self, bus: Bus) -> None:
        """Engines that went while there was no connection that could have told of it: once those
        that are there have had the time to be heard."""
        await anyio.sleep(bus.presence.ttl_s + 1)
        present = {(state.model, state.engine) for state in await bus.presence.list(self._model)}
        for model, engine in self.board.engines:
            if (model, engine) not in present:
                self.board.feed_gone(model, engine)

    async def _keep_fresh(self, bus: Bus, monitor: Monitor[Message]) -> None:
        while True:
            await anyio.sleep(REFRESH_S)
            self._refresh(bus, monitor)

    def _refresh(self, bus: Bus, monitor: Monitor[Message]) -> None:
        now_ns = self._clock.now_ns()
        if not bus.is_connected:
            self.board.lose(now_ns)
        elif not monitor.is_answered:
            self.board.lose(now_ns, "it does not answer")
        else:
            self.board.connect(bus.url, now_ns)
        self.board.refresh(now_ns)


def _first(errors: BaseExceptionGroup[BusError]) -> str:
    """What one of them says."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)
