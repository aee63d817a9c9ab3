"""Leases on a real server: of several clients exactly one wins, and the dead lose theirs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import anyio
import msgspec
import pytest

from tests.integration.bus.raw import publish_raw, raw_client
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.errors import LeaseLost
from weightbus.bus.streams import bus_streams
from weightbus.schemas.leases import ReaderLease, RoundLease
from weightbus.schemas.progress import DeadLetter

pytestmark = pytest.mark.anyio


def round_lease(leader: str, consumer: str = "c", round_id: str = "r") -> RoundLease:
    return RoundLease(model="m", round=round_id, leader=leader, epoch=0, consumer=consumer)


def reader_lease(engine: str, consumer: str = "c", version: int = 1) -> ReaderLease:
    return ReaderLease(model="m", version=version, engine=engine, consumer=consumer)


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    """Looks again and again: the server ends keys up to a second late, and tells nobody."""
    with anyio.fail_after(10):
        while not await is_so():  # noqa: ASYNC110
            await anyio.sleep(0.05)


async def until_free(bus: Bus) -> None:
    async def is_free() -> bool:
        return await bus.round_leases.holder("m", "r") is None

    await until(is_free)


async def test_round_is_led_by_whoever_came_first_when_two_want_it(bus: Bus) -> None:
    first = await bus.round_leases.acquire(round_lease("a"), 60)
    second = await bus.round_leases.acquire(round_lease("b"), 60)
    assert first.leader == "a"
    assert second == first == await bus.round_leases.holder("m", "r")


async def test_exactly_one_wins_when_many_clients_race(nats_server: NatsServer) -> None:
    rounds, clients = 10, 6
    won: list[tuple[str, RoundLease]] = []

    async def race(bus: Bus, name: str) -> None:
        for number in range(rounds):
            lease = await bus.round_leases.acquire(round_lease(name, round_id=f"r{number}"), 60)
            won.append((name, lease))

    async with AsyncExitStack() as stack:
        buses = [
            await stack.enter_async_context(open_bus(nats_server.settings)) for _ in range(clients)
        ]
        async with anyio.create_task_group() as tasks:
            for number, bus in enumerate(buses):
                tasks.start_soon(race, bus, f"client{number}")
    for number in range(rounds):
        held = [lease for _, lease in won if lease.round == f"r{number}"]
        assert len(held) == clients
        assert len(set(map(msgspec.json.encode, held))) == 1
        assert [name for name, lease in won if lease == held[0]].count(held[0].leader) == 1


async def test_epoch_grows_when_a_round_is_won_again(bus: Bus) -> None:
    first = await bus.round_leases.acquire(round_lease("a"), 60)
    again = await bus.round_leases.acquire(round_lease("a"), 60)
    await bus.round_leases.release(again)
    other = await bus.round_leases.acquire(round_lease("b"), 60)
    assert 0 < first.epoch < again.epoch < other.epoch
    assert (await bus.round_leases.renew(other, 60)).epoch == other.epoch
    assert await bus.round_leases.holder("m", "r") == other


async def test_round_is_led_when_its_leases_were_written_more_often_than_32_bits_count(
    nats_server: NatsServer,
) -> None:
    (rounds,) = (s for s in bus_streams("weightbus") if s.name == "KV_weightbus-rounds")
    config = msgspec.to_builtins(rounds) | {"first_seq": 2**31}
    async with raw_client(nats_server.url) as client:
        await client.request(f"$JS.API.STREAM.CREATE.{rounds.name}", msgspec.json.encode(config))
    async with open_bus(nats_server.settings) as bus:
        lease = await bus.round_leases.acquire(round_lease("a"), 60)
        assert lease.epoch == 2**31
        assert await bus.round_leases.renew(lease, 60) == lease
        assert await bus.round_leases.holder("m", "r") == lease


async def test_round_is_free_when_its_lease_has_run_out(bus: Bus) -> None:
    dead = await bus.round_leases.acquire(round_lease("dead"), 1)
    await until_free(bus)
    assert (await bus.round_leases.acquire(round_lease("heir"), 60)).leader == "heir"
    with pytest.raises(LeaseLost, match="heir holds it"):
        await bus.round_leases.renew(dead, 60)


async def test_renewing_raises_when_the_lease_has_run_out(bus: Bus) -> None:
    lease = await bus.round_leases.acquire(round_lease("a"), 1)
    await until_free(bus)
    with pytest.raises(LeaseLost, match="it ended"):
        await bus.round_leases.renew(lease, 60)


async def test_lease_outlives_its_first_ttl_when_renewed(bus: Bus) -> None:
    lease = await bus.round_leases.acquire(round_lease("a"), 1)
    for _ in range(8):
        await anyio.sleep(0.4)
        await bus.round_leases.renew(lease, 1)
    assert await bus.round_leases.holder("m", "r") == lease


async def test_renewing_raises_when_a_restarted_leader_has_another_consumer(bus: Bus) -> None:
    await bus.round_leases.acquire(round_lease("a", "new"), 60)
    with pytest.raises(LeaseLost):
        await bus.round_leases.renew(round_lease("a", "old"), 60)


async def test_release_does_nothing_when_another_holds_the_lease(bus: Bus) -> None:
    held = await bus.round_leases.acquire(round_lease("a"), 60)
    await bus.round_leases.release(round_lease("b"))
    assert await bus.round_leases.holder("m", "r") == held
    await bus.round_leases.release(held)
    assert await bus.round_leases.holder("m", "r") is None


async def test_unreadable_lease_counts_as_free_and_lands_on_dead_when_found(bus: Bus) -> None:
    await publish_raw(bus.url, "$KV.weightbus-rounds.m.r", b"junk", {})
    async with bus.subscribe(DeadLetter, model="m") as letters:
        lease = await bus.round_leases.acquire(round_lease("a"), 60)
        letter = await anext(letters)
    assert lease.leader == "a"
    assert "weightbus-rounds" in str(letter)


async def test_readers_are_those_with_a_lease_on_the_version_when_listed(bus: Bus) -> None:
    await bus.reader_leases.take(reader_lease("a"), 60)
    await bus.reader_leases.take(reader_lease("b"), 60)
    await bus.reader_leases.take(reader_lease("c", version=2), 60)
    await bus.reader_leases.release(reader_lease("a"))
    assert await bus.reader_leases.readers("m", 1) == (reader_lease("b"),)
    assert await bus.reader_leases.readers("m", 3) == ()


async def test_reader_is_gone_and_cannot_renew_when_its_lease_has_run_out(bus: Bus) -> None:
    await bus.reader_leases.take(reader_lease("a"), 1)

    async def is_gone() -> bool:
        return not await bus.reader_leases.readers("m", 1)

    await until(is_gone)
    with pytest.raises(LeaseLost):
        await bus.reader_leases.renew(reader_lease("a"), 60)


async def test_older_consumer_releases_nothing_when_a_newer_took_the_lease(bus: Bus) -> None:
    await bus.reader_leases.take(reader_lease("a", "old"), 60)
    await bus.reader_leases.take(reader_lease("a", "new"), 60)
    await bus.reader_leases.release(reader_lease("a", "old"))
    assert await bus.reader_leases.readers("m", 1) == (reader_lease("a", "new"),)
    await bus.reader_leases.release(reader_lease("a", "new"))
    assert await bus.reader_leases.readers("m", 1) == ()


async def test_older_consumer_cannot_renew_when_a_newer_took_the_lease(bus: Bus) -> None:
    await bus.reader_leases.take(reader_lease("a", "old"), 60)
    await bus.reader_leases.take(reader_lease("a", "new"), 60)
    with pytest.raises(LeaseLost, match="new holds it"):
        await bus.reader_leases.renew(reader_lease("a", "old"), 60)
    await bus.reader_leases.renew(reader_lease("a", "new"), 60)
