"""`weightbus watch`: the fleet and its updates, live.

On a terminal tables that renew themselves; elsewhere, and with `--json`, one line for every event.
It only reads, and outlives a restart of the bus and a terminal that stands still: it reads on where
it was, and says so where the bus no longer keeps that.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import anyio
import click
import msgspec
from msgspec import Struct
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from weightbus.bus.background import open_background
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.monitor import CaughtUp, Missed, open_monitor
from weightbus.bus.presence import EngineGone
from weightbus.bus.received import Received, Reconnected
from weightbus.bus.settings import BusSettings
from weightbus.cli.monitoring import close_broken_pipe, looked_back, running_bus
from weightbus.cli.outage import Outage, tell_outages
from weightbus.cli.until import until_stopped
from weightbus.schemas.base import Message
from weightbus.tracing.fleet_view import FleetTables
from weightbus.tracing.narration import narrate, narrate_gone, narrate_missed, time_of_day
from weightbus.tracing.watcher import WATCHED_MESSAGES, Fleet

__all__ = ("Options", "command", "run_watch")

REDRAW_S = 0.25

Event = Message | EngineGone | Missed | Reconnected

Tell = Callable[[Event, int], None]
"""Is told every event that is news, and when it came, in bus time."""


class Options(Struct, frozen=True, kw_only=True):
    """What was asked for."""

    bus: BusSettings
    model: str | None
    as_json: bool


@click.command("watch")
@click.option("--model", help="Only this model; else all that the bus knows of.")
@click.option("--nats", "nats_url", help="NATS URL; else WEIGHTBUS_NATS_URL.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per event.")
@click.option("--once", is_flag=True, help="Print the state now and exit.")
def command(model: str | None, nats_url: str | None, as_json: bool, once: bool) -> None:
    """Show engines, rounds in flight, and the last failures with their reasons, until Ctrl-C.

    Without a terminal it prints one line per event. With --json each event is one line: the message
    as `weightbus schema` describes it, and received_ns; an engine whose heartbeat ended is an
    EngineGone with model and engine. After an outage there is a Reconnected, and a Missed with
    stream and at_most where the bus no longer keeps what happened: as many messages were dropped,
    of all kinds and models (at_most null: who knows).

    --once --json prints one object: newest (model -> version), and the lists engines, rounds,
    failures, dead_letters and skipped.

    Exit codes: 0 shown or interrupted, 1 no bus, 2 used wrongly.
    """
    bus = running_bus(nats_url, "weightbus-watch")
    options = Options(bus=bus, model=model, as_json=as_json)
    try:
        anyio.run(run_once if once else run_watch, options)
    except* BrokenPipeError:
        close_broken_pipe()


async def run_once(options: Options) -> None:
    """Print the state now."""
    async with open_bus(options.bus) as bus:
        watch = Watch(bus, options.model)
        await watch.look_back()
        for state in await bus.presence.list(options.model):
            watch.fleet.feed(state, bus.clock.now_ns())
        view = watch.fleet.view(bus.clock.now_ns())
    if options.as_json:
        click.echo(msgspec.json.encode(view))
    else:
        Console().print(FleetTables(view))


async def run_watch(options: Options) -> None:
    """Show what happens, until SIGINT or SIGTERM."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_show, options)
        await until_stopped()
        tasks.cancel_scope.cancel()


async def _show(options: Options) -> None:
    async with open_bus(options.bus) as bus:
        if options.as_json or not sys.stdout.isatty():
            line_of = json_line if options.as_json else text_line
            async with open_background() as tasks:
                tasks.start_soon(tell_outages, bus, partial(_tell_lost, as_json=options.as_json))
                await Watch(bus, options.model).run(
                    lambda event, received_ns: click.echo(line_of(event, received_ns))
                )
        else:
            watch = Watch(bus, options.model)
            async with _redrawn(watch.fleet, bus):
                await watch.run()


def _tell_lost(lost: str, *, as_json: bool) -> None:
    """Beside the events where those are JSON; that it is back is an event."""
    if lost:
        click.echo(lost, err=as_json)


@asynccontextmanager
async def _redrawn(fleet: Fleet, bus: Bus) -> AsyncIterator[None]:
    """The fleet's tables on the terminal, drawn again and again."""
    outage = Outage(bus)
    with Live(auto_refresh=False) as live:

        async def redraw() -> None:
            while True:
                lost = [Text(line, style="bold red")] if (line := outage.look()) else []
                tables = FleetTables(fleet.view(bus.clock.now_ns()))
                live.update(Group(*lost, tables), refresh=True)
                await anyio.sleep(REDRAW_S)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(redraw)
            yield
            tasks.cancel_scope.cancel()


class Watch:
    """Feeds a fleet from a bus."""

    def __init__(self, bus: Bus, model: str | None) -> None:
        self.fleet = Fleet()
        self._bus, self._model = bus, model

    async def look_back(self) -> None:
        """Take in the newest versions, and the state that history tells of."""
        async for received in looked_back(self._bus, WATCHED_MESSAGES, self._model):
            self.fleet.feed(received.message, received.received_ns)

    async def run(self, tell: Tell = lambda event, received_ns: None) -> None:
        """Take in and tell what happens from now on, until cancelled.

        Raises:
            BusUnavailable, BusTimeout, RequestRefused
        """
        async with open_monitor(self._bus, *WATCHED_MESSAGES, model=self._model) as monitor:
            await self.look_back()
            async for event in monitor:
                match event:
                    case CaughtUp():
                        pass
                    case Received():
                        self._take(event.message, event.received_ns, tell)
                    case _:
                        self._take(event, self._bus.clock.now_ns(), tell)

    def _take(self, event: Event, received_ns: int, tell: Tell) -> None:
        if self._is_news(event, received_ns):
            tell(event, received_ns)

    def _is_news(self, event: Event, received_ns: int) -> bool:
        match event:
            case EngineGone():
                return self.fleet.feed_gone(event.model, event.engine)
            case Message():
                return self.fleet.feed(event, received_ns)
            case Missed() | Reconnected():
                return True


def json_line(event: Event, received_ns: int) -> bytes:
    """An event as one JSON object."""
    told = msgspec.to_builtins(event)
    if not isinstance(event, Message):
        told = {"type": type(event).__name__, **told}
    return msgspec.json.encode({"received_ns": received_ns, **told})


def text_line(event: Event, received_ns: int) -> str:
    """An event as a line for people."""
    match event:
        case EngineGone():
            told = narrate_gone(event.model, event.engine)
        case Missed():
            told = narrate_missed(event.stream, event.at_most)
        case Reconnected():
            told = "the connection to the bus was lost and is back"
        case Message():
            told = narrate(event)
    return f"{time_of_day(received_ns)} {told}"
