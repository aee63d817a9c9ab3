"""The server is killed with SIGKILL and started again with its data: everyone recovers."""

from __future__ import annotations

import logging
import os
import shutil
import signal

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec
import pytest

from tests.integration.bus.processes import halt
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.errors import BusTimeout, BusUnavailable
from weightbus.bus.presence import EngineGone
from weightbus.bus.received import Received, Reconnected
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.leases import ReaderLease, RoundLease
from weightbus.schemas.progress import EngineState
from weightbus.schemas.rounds import Commit

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

LEASE = RoundLease(model="m", round="r", leader="a", epoch=0, consumer="c")
READER = ReaderLease(model="m", version=1, engine="a", consumer="c")


def ready(version: int) -> CheckpointReady:
    return CheckpointReady(model="m", version=version, producer="trainer", files=("/a.st",))


def commit(version: int) -> Commit:
    return Commit(model="m", version=version, round="r", epoch=0)


def state(engine: str, version: int = 1) -> EngineState:
    return EngineState(
        model="m", engine=engine, consumer="c", host_id="h", status="serving", version=version
    )


async def restart(server: NatsServer) -> None:
    await anyio.to_thread.run_sync(server.restart)


async def test_subscriber_is_marked_and_goes_on_when_the_server_was_killed(
    bus: Bus, nats_server: NatsServer
) -> None:
    async with bus.subscribe(CheckpointReady, Commit, model="m") as messages:
        await bus.publish(ready(1))
        assert isinstance(await anext(messages), Received)
        await restart(nats_server)
        assert isinstance(await anext(messages), Reconnected)
        await bus.publish(ready(2))
        received = await anext(messages)
    assert isinstance(received, Received)
    assert received.message == ready(2)


async def test_stored_messages_are_there_when_the_server_was_killed(
    bus: Bus, nats_server: NatsServer
) -> None:
    blob = bytes(range(256)) * 4096
    await bus.publish(ready(1))
    await bus.publish(commit(1))
    await bus.objects.put("blob", blob)
    lease = await bus.round_leases.acquire(LEASE, 60)
    await bus.reader_leases.take(READER, 60)
    await restart(nats_server)
    last = await bus.last(CheckpointReady, model="m")
    assert last is not None
    assert last.message == ready(1)
    assert [item.message async for item in bus.replay(Commit)] == [commit(1)]
    assert await bus.objects.get("blob") == blob
    assert await bus.round_leases.holder("m", "r") == lease
    await bus.round_leases.renew(lease, 60)
    assert await bus.reader_leases.readers("m", 1) == (READER,)


async def test_repeat_is_dropped_when_the_server_was_killed_in_between(
    bus: Bus, nats_server: NatsServer
) -> None:
    await bus.publish(ready(1))
    await restart(nats_server)
    assert (await bus.publish(ready(1))).duplicate


async def test_publish_waits_and_is_stored_once_when_the_server_is_down(
    bus: Bus, nats_server: NatsServer
) -> None:
    await anyio.to_thread.run_sync(nats_server.kill)
    async with anyio.create_task_group() as tasks:
        for version in range(20):
            tasks.start_soon(bus.publish, commit(version))
        await anyio.wait_all_tasks_blocked()
        await anyio.to_thread.run_sync(nats_server.start)
    stored = [item.message.version async for item in bus.replay(Commit)]
    assert sorted(stored) == list(range(20))


async def test_messages_are_stored_once_when_the_server_is_killed_again_and_again(
    bus: Bus, nats_server: NatsServer
) -> None:
    sent = 0
    stop, batch_sent = anyio.Event(), anyio.Event()

    async def publish() -> None:
        nonlocal sent
        while not stop.is_set():
            await bus.publish(commit(sent))
            sent += 1
            if sent % 50 == 0:
                batch_sent.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish)
        for _ in range(3):
            await batch_sent.wait()
            await restart(nats_server)
            batch_sent = anyio.Event()
        stop.set()
    stored = [item.message.version async for item in bus.replay(Commit)]
    assert stored == list(range(sent))


async def test_streams_are_made_again_when_the_server_lost_its_data(
    bus: Bus, nats_server: NatsServer
) -> None:
    async with bus.subscribe(CheckpointReady) as messages, bus.presence.watch("m") as engines:
        await bus.presence.put(state("a"))
        await anext(engines)
        await anyio.to_thread.run_sync(nats_server.kill)
        shutil.rmtree(nats_server.data_dir)
        await anyio.to_thread.run_sync(nats_server.start)
        assert isinstance(await anext(messages), Reconnected)
        await bus.publish(ready(1))
        received = await anext(messages)
        await bus.presence.put(state("b"))
        assert await anext(engines) == state("b")
    assert isinstance(received, Received)
    assert received.message == ready(1)


async def test_presence_watch_recovers_when_the_server_was_killed(
    nats_server: NatsServer,
) -> None:
    settings = msgspec.structs.replace(nats_server.settings, presence_ttl_s=2)
    async with open_bus(settings) as bus, bus.presence.watch("m") as changes:
        await bus.presence.put(state("stays"))
        await bus.presence.put(state("dies"))
        assert {await anext(changes), await anext(changes)} == {state("stays"), state("dies")}
        await restart(nats_server)
        await bus.presence.put(state("stays"))
        await bus.presence.put(state("comes"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(beat, bus, "stays")
            tasks.start_soon(beat, bus, "comes")
            assert await anext(changes) == state("comes")
            with anyio.fail_after(10):
                assert await anext(changes) == EngineGone("m", "dies")
            tasks.cancel_scope.cancel()


async def test_no_engine_is_gone_when_the_server_was_away_for_longer_than_its_ttl(
    nats_server: NatsServer,
) -> None:
    settings = msgspec.structs.replace(nats_server.settings, presence_ttl_s=1)
    async with open_bus(settings) as bus, bus.presence.watch("m") as changes:
        await bus.presence.put(state("stays"))
        assert await anext(changes) == state("stays")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(beat, bus, "stays")
            await anyio.to_thread.run_sync(nats_server.kill)
            with anyio.move_on_after(2 * bus.presence.ttl_s):
                pytest.fail(f"reported {await anext(changes)} while the connection was lost")
            await anyio.to_thread.run_sync(nats_server.start)
            await bus.presence.put(state("comes"))
            assert await anext(changes) == state("comes")
            with anyio.fail_after(10):
                assert await anext(changes) == EngineGone("m", "comes")
            tasks.cancel_scope.cancel()


async def beat(bus: Bus, engine: str) -> None:
    while True:
        await bus.presence.put(state(engine))
        await anyio.sleep(0.5)


async def test_everything_raises_one_error_when_the_server_stays_away(
    nats_server: NatsServer, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    settings = msgspec.structs.replace(nats_server.settings, reconnect_for_s=1.0)
    async with (
        open_bus(settings) as bus,
        bus.subscribe(CheckpointReady) as messages,
        bus.presence.watch("m") as changes,
    ):
        await anyio.to_thread.run_sync(nats_server.kill)
        with anyio.fail_after(10):
            for waiting in (anext(messages), anext(changes), bus.publish(ready(1))):
                with pytest.raises(BusUnavailable, match="lost for 1 s"):
                    await waiting
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert caplog.text == ""


async def test_nothing_is_printed_when_a_reconnect_succeeds(
    bus: Bus,
    nats_server: NatsServer,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with bus.subscribe(CheckpointReady) as messages:
        await restart(nats_server)
        assert isinstance(await anext(messages), Reconnected)
        await bus.publish(ready(1))
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


async def test_bus_recovers_when_the_server_was_stopped_in_order(
    bus: Bus, nats_server: NatsServer
) -> None:
    async with bus.subscribe(CheckpointReady) as messages:
        await anyio.to_thread.run_sync(nats_server.stop)
        await anyio.to_thread.run_sync(nats_server.start)
        assert isinstance(await anext(messages), Reconnected)
        await bus.publish(ready(1))
        assert isinstance(await anext(messages), Received)


async def test_request_times_out_when_the_server_hangs_and_passes_when_it_goes_on(
    nats_server: NatsServer,
) -> None:
    settings = msgspec.structs.replace(nats_server.settings, request_timeout_s=0.3)
    async with open_bus(settings) as bus:
        halt(nats_server.pid)
        try:
            for waiting in (
                bus.publish(ready(1)),
                bus.last(CheckpointReady, model="m"),
                anext(bus.replay(Commit)),
                bus.objects.get("blob"),
                bus.presence.put(state("a")),
                bus.round_leases.acquire(LEASE, 60),
            ):
                with anyio.fail_after(5), pytest.raises(BusTimeout, match=r"within 0\.3 s"):
                    await waiting
        finally:
            os.kill(nats_server.pid, signal.SIGCONT)
        await bus.publish(commit(1))


async def test_bus_closes_quietly_when_the_server_is_killed_at_the_same_time(
    nats_server: NatsServer,
) -> None:
    for steps in range(12):
        async with open_bus(nats_server.settings):
            os.kill(nats_server.pid, signal.SIGKILL)
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
        await restart(nats_server)
    async with open_bus(nats_server.settings) as bus:
        await bus.publish(ready(1))
