"""Monitors on a real server: history and news as one, for slow readers and over restarts."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from typing import TypeVar

import anyio
import anyio.to_thread
import msgspec
import pytest

from tests.integration.bus.processes import halt
from tests.integration.bus.raw import raw_client
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.errors import BusTimeout, BusUnavailable, SettingInvalid
from weightbus.bus.monitor import CaughtUp, Missed, Monitor, MonitorEvent, open_monitor
from weightbus.bus.presence import EngineGone
from weightbus.bus.received import Received, Reconnected
from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointSkipped
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.progress import DeadLetter, EngineState, FirstToken
from weightbus.schemas.rounds import Commit, RoundComplete

pytestmark = pytest.mark.anyio

M = TypeVar("M", bound=Message)
Versioned = TypeVar("Versioned", CheckpointReady, Commit)

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


async def next_message(monitor: Monitor[M]) -> M:
    """Passes over marks."""
    while True:
        event = await anext(monitor)
        if isinstance(event, Received):
            return event.message


async def versions(monitor: Monitor[Versioned], last: int) -> list[int]:
    """Of every message, up to one of version `last`."""
    found: list[int] = []
    while not found or found[-1] != last:
        found.append((await next_message(monitor)).version)
    return found


async def until_caught_up(monitor: Monitor[M]) -> list[MonitorEvent[M]]:
    events: list[MonitorEvent[M]] = []
    while not isinstance(event := await anext(monitor), CaughtUp):
        events.append(event)
    return events


def told(events: Sequence[MonitorEvent[M]]) -> list[M]:
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
    """When, by the server's clock."""
    return [received.received_ns async for received in bus.replay(kind)][-1]


async def test_everything_that_is_kept_comes_when_the_time_is_0(bus: Bus) -> None:
    for version in range(3):
        await bus.publish(commit(version))
    async with open_monitor(bus, since_ns=0) as monitor:
        assert told(await until_caught_up(monitor)) == [commit(version) for version in range(3)]


async def test_history_of_a_version_begins_with_its_announcement(bus: Bus) -> None:
    for message in (ready(1), commit(1), ready(3), commit(1), commit(3), ready(4), commit(4)):
        await bus.publish(message)
    async with open_monitor(bus, model="m", from_version=2) as monitor:
        events = await until_caught_up(monitor)
        assert told(events) == [ready(3), commit(3), ready(4), commit(4)]
        await bus.publish(commit(1))
        await bus.publish(commit(5))
        assert await next_message(monitor) == commit(5)


async def test_only_news_come_when_no_such_version_was_announced_yet(bus: Bus) -> None:
    await bus.publish(ready(1))
    async with open_monitor(bus, model="m", from_version=3) as monitor:
        assert await until_caught_up(monitor) == []
        for version in (2, 3):
            await bus.publish(ready(version))
        assert await next_message(monitor) == ready(3)


async def test_loss_is_said_when_the_announcement_of_a_version_is_no_longer_kept(
    bus: Bus,
) -> None:
    for version in range(1, 21):
        await bus.publish(ready(version))
        await bus.publish(commit(version))
    async with open_monitor(bus, model="m", from_version=2) as monitor:
        events = await until_caught_up(monitor)
    assert Missed("CHECKPOINTS", None) in events
    kept = [message for message in told(events) if isinstance(message, CheckpointReady)]
    assert kept == [ready(version) for version in range(5, 21)]
    progress = [message for message in told(events) if isinstance(message, Commit)]
    assert progress == [commit(version) for version in range(2, 21)]


@pytest.mark.parametrize(("model", "since_ns", "version"), [
    (None, None, 1), ("m", 5, 1), ("m", None, -1),
])  # fmt: skip
async def test_version_is_refused_by_name_when_it_cannot_be_used(
    model: str | None, since_ns: int | None, version: int, bus: Bus
) -> None:
    with pytest.raises(SettingInvalid, match="from_version"):
        open_monitor(bus, model=model, since_ns=since_ns, from_version=version)


async def test_type_is_refused_by_name_when_it_is_not_published_on_a_subject(bus: Bus) -> None:
    with pytest.raises(MessageInvalid, match="EngineState"):
        async with open_monitor(bus, EngineState):
            pass


async def test_messages_of_two_streams_come_in_the_order_in_which_they_were_said(bus: Bus) -> None:
    said = [kind(version) for version in range(100) for kind in (ready, commit)]
    async with open_monitor(bus, model="m") as monitor, anyio.create_task_group() as tasks:

        async def say() -> None:
            for message in said:
                await bus.publish(message)

        tasks.start_soon(say)
        assert [await next_message(monitor) for _ in said] == said


async def test_reader_reads_on_where_it_was_when_it_stood_still(nats_server: NatsServer) -> None:
    settings = msgspec.structs.replace(nats_server.settings, max_unread_messages=8)
    async with open_bus(settings) as bus, open_monitor(bus, Commit) as monitor:
        await bus.publish(commit(0))
        assert await next_message(monitor) == commit(0)
        await publish_many(bus, 1, BURST)
        assert await versions(monitor, BURST - 1) == list(range(1, BURST))


async def publish_many(bus: Bus, begin: int, end: int) -> None:
    for version in range(begin, end):
        await bus.publish(commit(version))


async def test_loss_is_said_when_a_reader_stood_still_for_longer_than_is_kept(bus: Bus) -> None:
    async with open_monitor(bus, CheckpointReady) as monitor:
        await until_caught_up(monitor)
        for version in range(1, 21):
            await bus.publish(ready(version))
        assert await anext(monitor) == Missed("CHECKPOINTS", 4)
        assert await versions(monitor, 20) == list(range(5, 21))


async def test_no_loss_is_said_when_as_many_came_as_are_kept(bus: Bus) -> None:
    async with open_monitor(bus, CheckpointReady) as monitor:
        await until_caught_up(monitor)
        for version in range(1, 17):
            await bus.publish(ready(version))
            await bus.publish(ready(version, "other"))
        events = [await anext(monitor) for _ in range(32)]
        assert [event for event in events if not isinstance(event, Received)] == []


async def test_loss_is_said_when_the_stream_has_dropped_what_came_while_it_was_away(
    bus: Bus, nats_server: NatsServer
) -> None:
    async with open_monitor(bus, Commit) as monitor:
        await bus.publish(commit(0))
        assert await next_message(monitor) == commit(0)
        await publish_many(bus, 1, 11)
        async with raw_client(nats_server.url) as client:
            await client.jetstream().purge_stream("weightbus-PROGRESS", keep=3)
        await restart(nats_server)
        assert await anext(monitor) == Reconnected()
        assert await anext(monitor) == Missed("PROGRESS", 7)
        assert await versions(monitor, 10) == [8, 9, 10]


async def test_monitor_is_told_what_it_missed_when_the_server_was_killed(
    bus: Bus, nats_server: NatsServer
) -> None:
    async with open_monitor(bus, model="m", engines=False) as monitor:
        assert await anext(monitor) == CaughtUp()
        await bus.publish(commit(1))
        assert await next_message(monitor) == commit(1)
        await bus.publish(commit(2))
        await restart(nats_server)
        async with open_bus(nats_server.settings) as other:
            await other.publish(ready(3))
            assert await anext(monitor) == Reconnected()
            await other.publish(commit(4))
            assert [await next_message(monitor) for _ in range(3)] == [
                commit(2), ready(3), commit(4),
            ]  # fmt: skip


async def test_nothing_is_lost_or_repeated_when_the_server_is_killed_in_a_burst(
    bus: Bus, nats_server: NatsServer
) -> None:
    batch_sent, stop, sent = anyio.Event(), anyio.Event(), 0

    async def publish() -> None:
        nonlocal sent, batch_sent
        while not stop.is_set():
            await bus.publish(commit(sent))
            sent += 1
            if sent % 100 == 0:
                batch_sent.set()
        await bus.publish(RoundComplete(model="m", version=sent, round="r", epoch=0, leader="a"))

    async with (
        open_bus(nats_server.settings) as other,
        open_monitor(other, Commit, RoundComplete) as monitor,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(publish)

        async def kill() -> None:
            nonlocal batch_sent
            for _ in range(3):
                await batch_sent.wait()
                await restart(nats_server)
                batch_sent = anyio.Event()
            stop.set()

        tasks.start_soon(kill)
        heard: list[int] = []
        while isinstance(message := await next_message(monitor), Commit):
            heard.append(message.version)
    assert heard == list(range(sent))


async def test_loss_is_said_and_the_monitor_goes_on_when_the_server_lost_its_data(
    bus: Bus, nats_server: NatsServer
) -> None:
    async with open_monitor(bus, Commit, engines=False) as monitor:
        assert await anext(monitor) == CaughtUp()
        await publish_many(bus, 1, 5)
        assert await versions(monitor, 4) == [1, 2, 3, 4]
        await anyio.to_thread.run_sync(nats_server.kill)
        shutil.rmtree(nats_server.data_dir)
        await anyio.to_thread.run_sync(nats_server.start)
        assert await anext(monitor) == Reconnected()
        await publish_many(bus, 5, 7)
        assert await anext(monitor) == Missed("PROGRESS", None)
        assert await versions(monitor, 6) == [5, 6]


async def test_loss_is_said_when_the_stream_was_made_anew_on_the_same_connection(
    bus: Bus, nats_server: NatsServer
) -> None:
    async with open_monitor(bus, Commit, engines=False) as monitor:
        await publish_many(bus, 1, 5)
        assert await versions(monitor, 4) == [1, 2, 3, 4]
        async with raw_client(nats_server.url) as client:
            await client.jetstream().delete_stream("weightbus-PROGRESS")
        async with open_bus(nats_server.settings) as other:
            await publish_many(other, 5, 7)
        assert await anext(monitor) == Missed("PROGRESS", None)
        assert await versions(monitor, 6) == [5, 6]


async def test_other_readers_and_the_bus_go_on_when_one_crashes_in_its_loop(bus: Bus) -> None:
    async with open_monitor(bus, Commit) as other:
        await bus.publish(commit(1))
        with pytest.raises(ZeroDivisionError):
            await crash(bus)
        await bus.publish(commit(2))
        assert await versions(other, 2) == [1, 2]


async def crash(bus: Bus) -> None:
    async with open_monitor(bus, Commit, since_ns=0) as monitor:
        async for event in monitor:
            if isinstance(event, Received):
                raise ZeroDivisionError


async def test_iteration_ends_when_the_monitor_is_closed(bus: Bus) -> None:
    async with open_monitor(bus, Commit, since_ns=0) as monitor:
        await bus.publish(commit(1))
    assert [event async for event in monitor] == []


async def test_nothing_is_lost_when_the_reader_gives_up_waiting_again_and_again(bus: Bus) -> None:
    heard: list[int] = []
    async with open_monitor(bus, Commit, since_ns=0) as monitor, anyio.create_task_group() as tasks:
        tasks.start_soon(publish_many, bus, 0, 200)
        steps = 0
        while 199 not in heard:
            steps += 1
            with anyio.move_on_after(0.0002 * (steps % 25)):
                event = await anext(monitor)
                if isinstance(event, Received):
                    heard.append(event.message.version)
    assert heard == list(range(200))


async def test_engines_that_are_there_come_after_history_and_then_their_changes(bus: Bus) -> None:
    await bus.presence.put(state("a"))
    await bus.publish(commit(1))
    async with open_monitor(bus, model="m", since_ns=0) as monitor:
        assert told([await anext(monitor)]) == [commit(1)]
        assert await anext(monitor) == state("a")
        assert await anext(monitor) == CaughtUp()
        await bus.presence.put(state("a", 2))
        assert await anext(monitor) == state("a", 2)
        await bus.presence.drop("m", "a")
        assert await anext(monitor) == EngineGone("m", "a")


async def test_messages_have_their_turn_when_engines_change_without_end(bus: Bus) -> None:
    async with open_monitor(bus, Commit) as monitor, anyio.create_task_group() as tasks:
        await until_caught_up(monitor)
        await bus.publish(commit(1))
        for number in range(200):
            await bus.presence.put(state(f"e{number}"))
        heard = [await anext(monitor) for _ in range(66)]
        assert told(heard) == [commit(1)]
        tasks.cancel_scope.cancel()


async def test_engines_are_left_out_when_they_are_not_wanted(bus: Bus) -> None:
    async with open_monitor(bus, Commit, engines=False) as monitor:
        await bus.presence.put(state("a"))
        await bus.publish(commit(1))
        assert [await anext(monitor), (await next_message(monitor))] == [CaughtUp(), commit(1)]


async def test_what_cannot_be_read_is_left_out_and_answered_when_it_is_new(
    bus: Bus, nats_server: NatsServer
) -> None:
    async with raw_client(nats_server.url) as client:
        stream = client.jetstream()
        await stream.publish("weightbus.m.round.old.commit", b"old", headers={})
        await bus.publish(commit(1))
        async with open_monitor(bus, Commit, DeadLetter, since_ns=0) as monitor:
            assert told(await until_caught_up(monitor)) == [commit(1)]
            await stream.publish("weightbus.m.round.new.commit", b"new", headers={})
            letter = await next_message(monitor)
    assert isinstance(letter, DeadLetter)
    assert letter.subject == "weightbus.m.round.new.commit"


async def test_repeat_that_the_stream_drops_is_told_once(bus: Bus) -> None:
    skipped = CheckpointSkipped(
        model="m", version=1, producer="trainer", cause="busy", reason="a reads"
    )
    async with open_monitor(bus, CheckpointReady, CheckpointSkipped) as monitor:
        for message in (ready(1), ready(1), skipped, skipped, ready(2)):
            await bus.publish(message)
        assert [await next_message(monitor) for _ in range(3)] == [ready(1), skipped, ready(2)]


async def test_monitor_waits_for_a_server_that_hangs(nats_server: NatsServer) -> None:
    settings = msgspec.structs.replace(nats_server.settings, request_timeout_s=0.3)
    async with (
        open_bus(settings) as bus,
        open_monitor(bus, Commit) as monitor,
        anyio.create_task_group() as tasks,
    ):
        await until_caught_up(monitor)
        heard: list[Commit] = []

        async def hear() -> None:
            heard.append(await next_message(monitor))

        halt(nats_server.pid)
        try:
            tasks.start_soon(hear)
            for _ in range(3):
                with pytest.raises(BusTimeout):
                    await bus.last(CheckpointReady, model="m")
        finally:
            os.kill(nats_server.pid, signal.SIGCONT)
        await bus.publish(commit(1))
    assert heard == [commit(1)]


async def test_monitor_fails_by_name_when_the_server_hangs_for_too_long(
    nats_server: NatsServer,
) -> None:
    settings = msgspec.structs.replace(
        nats_server.settings, request_timeout_s=0.3, reconnect_for_s=1.0
    )
    async with open_bus(settings) as bus, open_monitor(bus, Commit) as monitor:
        await until_caught_up(monitor)
        halt(nats_server.pid)
        try:
            with anyio.fail_after(30), pytest.raises(BusTimeout):
                await anext(monitor)
        finally:
            os.kill(nats_server.pid, signal.SIGCONT)


async def test_monitor_fails_by_name_when_the_server_stays_away(nats_server: NatsServer) -> None:
    settings = msgspec.structs.replace(nats_server.settings, reconnect_for_s=1.0)
    async with open_bus(settings) as bus, open_monitor(bus, Commit) as monitor:
        await until_caught_up(monitor)
        await anyio.to_thread.run_sync(nats_server.kill)
        for _ in range(2):
            with anyio.fail_after(30), pytest.raises(BusUnavailable, match="lost for 1 s"):
                await anext(monitor)


async def test_engines_come_without_a_pause_when_they_are_many(bus: Bus) -> None:
    """More than come in a row before messages have their turn: nothing rings in between."""
    async with anyio.create_task_group() as tasks:
        for number in range(200):
            tasks.start_soon(bus.presence.put, state(f"e{number}"))
    async with open_monitor(bus, model="m") as monitor:
        with anyio.fail_after(4.5):  # a look that nothing has rung for comes after 5 s
            engines = [await anext(monitor) for _ in range(200)]
    assert sum(isinstance(engine, EngineState) for engine in engines) >= 199
