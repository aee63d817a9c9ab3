"""Monitors on a real server: history and news as one, for slow readers and over restarts."""

from __future__ import annotations

import shutil

import anyio
import anyio.to_thread
import msgspec
import pytest

from tests.integration.bus.raw import raw_client
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.errors import BusUnavailable, SettingInvalid
from weightbus.bus.monitor import CaughtUp, Missed, Monitor, MonitorEvent, open_monitor
from weightbus.bus.presence import EngineGone
from weightbus.bus.received import Received, Reconnected
from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointSkipped
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.progress import DeadLetter, EngineState, FirstToken
from weightbus.schemas.rounds import Commit, RoundComplete

pytestmark = pytest.mark.anyio

BURST = 1500
"""Messages: several pages of a stream."""


def ready(version: int, model: str = "m") -> CheckpointReady:
    return CheckpointReady(model=model, version=version, producer="trainer", files=("/a.st",))


def commit(version: int, model: str = "m") -> Commit:
    return Commit(model=model, version=version, round=f"v{version}", epoch=0)


def token(version: int) -> FirstToken:
    return FirstToken(
        model="m", version=version, round=f"v{version}", engine="a", start_ns=1, end_ns=2
    )


def state(engine: str, version: int = 1) -> EngineState:
    return EngineState(
        model="m", engine=engine, consumer="c", host_id="h", status="serving", version=version
    )


async def next_message(monitor: Monitor[Message]) -> Message:
    """Passes over marks."""
    while True:
        event = await anext(monitor)
        if isinstance(event, Received):
            message: Message = event.message
            return message


async def versions(monitor: Monitor[Message], last: int) -> list[int]:
    """Of every message, up to one of version `last`."""
    found: list[int] = []
    while not found or found[-1] != last:
        found.append((await next_message(monitor)).version)  # type: ignore[attr-defined]
    return found


async def until_caught_up(monitor: Monitor[Message]) -> list[MonitorEvent[Message]]:
    events: list[MonitorEvent[Message]] = []
    while not isinstance(event := await anext(monitor), CaughtUp):
        events.append(event)
    return events


def told(events: list[MonitorEvent[Message]]) -> list[Message]:
    return [event.message for event in events if isinstance(event, Received)]


async def restart(server: NatsServer) -> None:
    await anyio.to_thread.run_sync(server.restart)


async def test_monitor_tells_what_is_published_from_now_on(bus: Bus) -> None:
    await bus.publish(ready(1))
    async with open_monitor(bus) as monitor:
        said: list[Message] = [ready(2), commit(2), token(2), ready(3, "other")]
        for message in said:
            await bus.publish(message)
        assert isinstance(await anext(monitor), CaughtUp)
        assert [await next_message(monitor) for _ in said] == said


async def test_monitor_tells_the_types_and_the_model_that_it_was_asked_for(bus: Bus) -> None:
    async with open_monitor(bus, FirstToken, CheckpointReady, model="m") as monitor:
        for message in (ready(1), commit(1), ready(1, "other"), token(1), ready(2)):
            await bus.publish(message)
        assert [await next_message(monitor) for _ in range(3)] == [ready(1), token(1), ready(2)]


async def test_history_comes_in_its_order_before_news_when_a_time_is_given(bus: Bus) -> None:
    await bus.publish(ready(1))
    await bus.publish(commit(1))
    since_ns = (await last_stored(bus, Commit)) + 1
    history: list[Message] = [commit(2), ready(2), commit(3), ready(3), commit(4)]
    for message in history:
        await bus.publish(message)
    async with open_monitor(bus, model="m", since_ns=since_ns) as monitor:
        await bus.publish(ready(5))
        events = await until_caught_up(monitor)
        assert told(events)[:5] == history
        seen = told(events)[5:]
        assert (seen or [await next_message(monitor)]) == [ready(5)]


async def last_stored(bus: Bus, kind: type[Message]) -> int:
    last = [received.received_ns async for received in bus.replay(kind)]
    return last[-1]


async def test_everything_that_is_kept_comes_when_the_time_is_0(bus: Bus) -> None:
    for version in range(3):
        await bus.publish(commit(version))
    async with open_monitor(bus, since_ns=0) as monitor:
        assert told(await until_caught_up(monitor)) == [commit(version) for version in range(3)]
