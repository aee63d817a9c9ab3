"""Engines on hosts with a network between them: what crosses it, and what becomes of a cut."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from tests.integration.fleet.elsewhere import filler, routes_of
from tests.integration.fleet.engines import Engines
from tests.integration.fleet.fleet import Fleet, Trainer, open_fleet
from tests.integration.fleet.processes import Child, consume_beside
from tests.integration.fleet.staging import turns_of, until_filled
from tests.integration.network.namespaces import Host, Network
from tests.nats_server import NatsServer, running_server
from weightbus.bus.endpoint import P2pOptions
from weightbus.consumers.engines.torch.client import TorchEngineClient, open_torch_client
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import UpdateComplete
from weightbus.schemas.rounds import RoundComplete, RoundPlan

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

SIZE_BYTES = 64 * 2**20
HEADERS = 1.15
"""What headers, acknowledgements and the bus may add to the bytes of a version."""

SLOW_BYTES_PER_S = 16 * 2**20
"""A version takes some seconds: time enough for a cut."""

STAGING = "16MiB"


@pytest.fixture
def bridged_server(network: Network, tmp_path: Path) -> Iterator[NatsServer]:
    """A nats-server that all hosts reach."""
    with running_server(tmp_path / "nats", network.address) as server:
        yield server


@pytest.fixture
async def wide_fleet(
    bridged_server: NatsServer, engines: Engines, network: Network, tmp_path: Path
) -> AsyncIterator[Fleet]:
    """A fleet whose trainer runs outside of all hosts."""
    async with open_fleet(bridged_server, engines, tmp_path) as fleet:
        fleet.p2p = P2pOptions(address=network.address)
        yield fleet


@dataclass(frozen=True)
class Remote:
    """An engine whose consumer runs on some host of the network."""

    name: str
    host: Host
    fleet: Fleet
    consumer: Child
    client: TorchEngineClient

    async def completes(self, version: int) -> UpdateComplete:
        return await self.fleet.completes(self.name, self.client, version)


@asynccontextmanager
async def remote(fleet: Fleet, name: str, host: Host) -> AsyncIterator[Remote]:
    options = {
        "--host-id": host.id,
        "--address": host.address,
        "--staging-bytes": STAGING,
        "--join-window": "30",
    }
    engine = await fleet.engine(name)
    async with (
        open_torch_client(engine.directory) as client,
        fleet.watched(client),
        consume_beside(fleet, name, options, host.command) as consumer,
    ):
        yield Remote(name, host, fleet, consumer, client)


async def publish(trainer: Trainer) -> CheckpointReady:
    return await trainer.publish(filler=filler(SIZE_BYTES))


async def routes_to(fleet: Fleet, version: int) -> dict[str, str]:
    return routes_of(await fleet.log.wait(RoundPlan, version=version))


async def test_each_byte_comes_once_to_each_host_when_two_take_a_broadcast(
    wide_fleet: Fleet, network: Network
) -> None:
    fleet, (first_host, second_host, third_host) = wide_fleet, network.hosts
    async with (
        fleet.publisher(p2p=fleet.p2p) as trainer,
        remote(fleet, "b", first_host) as b,
        remote(fleet, "c", second_host) as c,
    ):
        first = (await publish(trainer)).version
        for engine in (b, c):  # by broadcast, if an earlier test has let them prove their plans
            await engine.completes(first)
        received = [engine.host.received_bytes for engine in (b, c)]
        sent = [engine.host.sent_bytes for engine in (b, c)]
        second = (await publish(trainer)).version
        for engine in (b, c):
            assert (await engine.completes(second)).routes == ("broadcast",)
        assert await routes_to(fleet, second) == {"b": "broadcast", "c": "broadcast"}
        for engine, before in zip((b, c), received, strict=True):
            came = engine.host.received_bytes - before
            assert SIZE_BYTES <= came <= SIZE_BYTES * HEADERS, f"{came / 2**20:.1f} MiB"
        went = b.host.sent_bytes + c.host.sent_bytes - sum(sent)
        assert went <= SIZE_BYTES * HEADERS, f"{went / 2**20:.1f} MiB"  # half from each

        before = third_host.received_bytes
        async with remote(fleet, "d", third_host) as d:
            assert (await d.completes(second)).routes == ("p2p",)
            assert third_host.received_bytes - before >= SIZE_BYTES
            third = (await publish(trainer)).version
            for engine in (b, c, d):
                assert (await engine.completes(third)).routes == ("broadcast",)


async def test_others_finish_and_the_lost_one_catches_up_when_a_cable_is_pulled(
    wide_fleet: Fleet, network: Network
) -> None:
    fleet, (first_host, second_host, _) = wide_fleet, network.hosts
    async with (
        fleet.publisher(p2p=fleet.p2p) as trainer,
        remote(fleet, "b", first_host) as b,
        remote(fleet, "c", second_host) as c,
    ):
        first = (await publish(trainer)).version
        for engine in (b, c):
            await engine.completes(first)
        for engine in (b, c):
            engine.host.limit(SLOW_BYTES_PER_S)
        before = turns_of(fleet.model)
        second = (await publish(trainer)).version
        assert await routes_to(fleet, second) == {"b": "broadcast", "c": "broadcast"}
        await until_filled(fleet.model, 3, after=before)
        with second_host.is_cut():
            done = await b.completes(second)
            plan = await fleet.log.wait(RoundPlan, version=second)
            assert (done.end_ns - done.start_ns) / 1e9 < plan.budgets.transfer_s
            ended = await fleet.log.wait(RoundComplete, version=second)
            assert (ended.completed, set(ended.failed)) == (("b",), {"c"})
        assert (await c.completes(second)).routes == ("p2p",)
        third = (await publish(trainer)).version
        for engine in (b, c):
            await engine.completes(third)


async def test_version_arrives_when_a_cable_was_out_for_a_moment_only(
    wide_fleet: Fleet, network: Network
) -> None:
    fleet, (first_host, second_host, _) = wide_fleet, network.hosts
    async with (
        fleet.publisher(p2p=fleet.p2p) as trainer,
        remote(fleet, "b", first_host) as b,
        remote(fleet, "c", second_host) as c,
    ):
        first = (await publish(trainer)).version
        for engine in (b, c):
            await engine.completes(first)
            engine.host.limit(SLOW_BYTES_PER_S)
        before = turns_of(fleet.model)
        second = (await publish(trainer)).version
        block = await until_filled(fleet.model, 3, after=before)
        with first_host.is_cut():
            held = first_host.received_bytes
            await anyio.sleep(0.5)  # the cut itself, not a wait for anything
            assert first_host.received_bytes == held
        assert block.exists()
        for engine in (b, c):
            await engine.completes(second)
