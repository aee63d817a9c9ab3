"""Heartbeats on a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec
import pytest

from tests.integration.bus.raw import publish_raw, raw_client
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.presence import EngineGone
from weightbus.schemas.progress import DeadLetter, EngineState, EngineStatus

pytestmark = pytest.mark.anyio

TTL_S = 1


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Bus]:
    settings = msgspec.structs.replace(nats_server.settings, presence_ttl_s=TTL_S)
    async with open_bus(settings) as bus:
        yield bus


def state(
    engine: str, status: EngineStatus = "serving", *, model: str = "m", updated_ns: int = 0
) -> EngineState:
    return EngineState(
        model=model,
        engine=engine,
        consumer="c",
        host_id="h",
        status=status,
        updated_ns=updated_ns,
    )


async def beat(bus: Bus, engine: str) -> None:
    beats = 0
    while True:
        beats += 1
        await bus.presence.put(state(engine, updated_ns=beats))
        await anyio.sleep(TTL_S / 3)


async def test_engines_are_listed_when_their_heartbeats_are_fresh(bus: Bus) -> None:
    assert await bus.presence.list("m") == ()
    await bus.presence.put(state("a"))
    await bus.presence.put(state("b"))
    await bus.presence.put(state("a", "updating"))
    await bus.presence.put(state("x", model="other"))
    await bus.presence.drop("m", "b")
    assert await bus.presence.list("m") == (state("a", "updating"),)


async def test_engines_of_all_models_are_listed_when_no_model_is_named(bus: Bus) -> None:
    states = {state("a"), state("b"), state("a", model="other")}
    for one in states:
        await bus.presence.put(one)
    assert set(await bus.presence.list(None)) == states


async def test_watch_tells_engines_of_models_apart_when_they_have_one_name(bus: Bus) -> None:
    mine, other = state("a"), state("a", model="other")
    async with bus.presence.watch(None) as changes:
        await bus.presence.put(mine)
        assert await anext(changes) == mine
        await bus.presence.put(other)
        assert await anext(changes) == other
        await bus.presence.drop("m", "a")
        assert await anext(changes) == EngineGone("m", "a")
        assert await anext(changes) == EngineGone("other", "a")


async def test_watch_begins_with_the_engines_that_are_there_when_opened(bus: Bus) -> None:
    await bus.presence.put(state("a"))
    async with bus.presence.watch("m") as changes:
        assert await anext(changes) == state("a")
        await bus.presence.put(state("b"))
        assert await anext(changes) == state("b")


async def test_watch_reports_changes_only_when_engines_beat(bus: Bus) -> None:
    async with bus.presence.watch("m") as changes:
        await bus.presence.put(state("a", updated_ns=1))
        assert await anext(changes) == state("a", updated_ns=1)
        for beats in (2, 3):
            await bus.presence.put(state("a", updated_ns=beats))
        await bus.presence.put(state("a", "updating", updated_ns=4))
        assert await anext(changes) == state("a", "updating", updated_ns=4)


async def test_engine_is_there_when_its_heartbeats_go_on_by_a_clock_that_was_set_back(
    bus: Bus,
) -> None:
    async with bus.presence.watch("m") as changes:
        await bus.presence.put(state("a", updated_ns=10**9))
        assert await anext(changes) == state("a", updated_ns=10**9)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(beat, bus, "a")
            with anyio.move_on_after(3 * TTL_S) as waited:
                raise AssertionError(await anext(changes))
            assert waited.cancelled_caught
            await bus.presence.put(state("a", "updating", updated_ns=5 * 10**8))
            assert (await anext(changes)) == state("a", "updating", updated_ns=5 * 10**8)
            tasks.cancel_scope.cancel()


async def test_watch_reports_leave_at_once_when_an_engine_takes_it(bus: Bus) -> None:
    async with bus.presence.watch("m") as changes:
        await bus.presence.put(state("a"))
        assert await anext(changes) == state("a")
        await bus.presence.drop("m", "a")
        with anyio.fail_after(TTL_S / 2):
            assert await anext(changes) == EngineGone("m", "a")


async def test_watch_notices_expiry_within_ttl_and_a_second_when_heartbeats_stop(bus: Bus) -> None:
    async with bus.presence.watch("m") as changes:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(beat, bus, "alive")
            assert await anext(changes) == state("alive", updated_ns=1)
            await bus.presence.put(state("dead"))
            stopped = anyio.current_time()
            assert await anext(changes) == state("dead")
            assert await anext(changes) == EngineGone("m", "dead")
            took_s = anyio.current_time() - stopped
            tasks.cancel_scope.cancel()
        assert TTL_S <= took_s <= TTL_S + 1
        assert await anext(changes) == EngineGone("m", "alive")


async def test_engine_is_reported_again_when_it_comes_back_after_expiry(bus: Bus) -> None:
    async with bus.presence.watch("m") as changes:
        await bus.presence.put(state("a"))
        assert [await anext(changes) for _ in range(2)] == [state("a"), EngineGone("m", "a")]
        await bus.presence.put(state("a"))
        assert await anext(changes) == state("a")


async def test_unreadable_heartbeat_lands_on_dead_when_heard(bus: Bus) -> None:
    async with bus.subscribe(DeadLetter) as letters, bus.presence.watch("m") as changes:
        await publish_raw(bus.url, "$KV.weightbus-presence.m.a", b"junk", {})
        await bus.presence.put(state("b"))
        assert await anext(changes) == state("b")
        assert "weightbus-presence.m.a" in str(await anext(letters))
    assert await bus.presence.list("m") == (state("b"),)


async def test_standard_client_sees_states_and_expiry_when_it_watches_the_bucket(
    bus: Bus,
) -> None:
    async with raw_client(bus.url) as client:
        bucket = await client.jetstream().key_value("weightbus-presence")
        watcher: Any = await bucket.watchall()
        await bus.presence.put(state("a"))
        seen: list[tuple[str, str | None]] = []
        while len(seen) < 2:
            entry = await watcher.updates(timeout=10)
            if entry is not None:  # which says that what was there has been seen
                seen.append((entry.key, entry.operation))
        await watcher.stop()
    assert seen == [("m.a", None), ("m.a", "PURGE")]
