"""A nats-server that is killed and started again with its data, and connections that are cut."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from msgspec import structs

from tests.integration.fleet.cable import open_cable
from tests.integration.fleet.engines import Engines
from tests.integration.fleet.fleet import Fleet, open_fleet
from tests.integration.fleet.held import Moment
from tests.nats_server import NatsServer
from weightbus.bus.errors import BusUnavailable
from weightbus.consumers.engines.torch.client import open_torch_client
from weightbus.schemas.progress import UpdateFailed

pytestmark = pytest.mark.anyio

RECONNECT_FOR_S = 0.5
NEVER_S = 3600.0
"""Who has lost the bus has nothing to wait for: if it waited for this, the test would not end."""


@pytest.fixture
async def own_fleet(
    nats_server: NatsServer, engines: Engines, tmp_path: Path
) -> AsyncIterator[Fleet]:
    """A fleet whose bus may be killed."""
    async with open_fleet(nats_server, engines, tmp_path) as fleet:
        yield fleet


async def test_engines_follow_when_the_bus_was_restarted_between_two_versions(
    own_fleet: Fleet,
) -> None:
    fleet = own_fleet
    async with fleet.follow("a") as a, fleet.follow("b") as b, fleet.publisher() as trainer:
        for restart in (False, True, True):
            if restart:
                await anyio.to_thread.run_sync(fleet.server.restart)
            version = (await trainer.publish()).version
            for follower in (a, b):
                await follower.completes(version)
    assert fleet.log.said(UpdateFailed) == []


@pytest.mark.parametrize("moment", ["before_describe", "before_pause", "after_apply"])
async def test_round_is_finished_when_the_bus_is_restarted_in_the_middle_of_it(
    own_fleet: Fleet, moment: Moment
) -> None:
    fleet = own_fleet
    async with (
        fleet.follow("a", hold=moment) as a,
        fleet.follow("b") as b,
        fleet.publisher() as trainer,
    ):
        first = (await trainer.publish()).version
        await a.held.reached.wait()
        await anyio.to_thread.run_sync(fleet.server.kill)
        a.held.release()
        await anyio.to_thread.run_sync(fleet.server.start)
        for follower in (a, b):
            await follower.completes(first)
        second = (await trainer.publish()).version
        for follower in (a, b):
            await follower.completes(second)
    assert fleet.log.said(UpdateFailed) == []


async def test_engine_takes_what_was_published_while_its_consumer_was_cut_off(
    fleet: Fleet,
) -> None:
    async with open_cable(fleet.server.url) as cable, fleet.publisher() as trainer:
        settings = structs.replace(fleet.settings, url=cable.url)
        async with fleet.follow("a", settings=settings) as a, fleet.follow("b") as b:
            first = (await trainer.publish()).version
            for follower in (a, b):
                await follower.completes(first)
            cable.cut()
            second = (await trainer.publish()).version
            await b.completes(second)
            await a.serves(first)
            cable.mend()
            await a.completes(second)
    assert fleet.log.said(UpdateFailed) == []


async def test_engine_finishes_when_its_consumer_is_cut_off_in_the_middle_of_a_round(
    fleet: Fleet,
) -> None:
    """Nobody hears of it for longer than its presence lasts; the update does not need the bus."""
    async with open_cable(fleet.server.url) as cable, fleet.publisher() as trainer:
        settings = structs.replace(fleet.settings, url=cable.url)
        async with fleet.follow("a", settings=settings) as a, fleet.follow("b") as b:
            hold = a.engine.hold("before_apply")
            version = (await trainer.publish()).version
            await hold.reached.wait()
            await b.completes(version)
            cable.cut()

            async def is_missed() -> bool:
                return await fleet.present("a") is None

            await fleet.eventually("the heartbeat of a has run out", is_missed)
            hold.release()

            async def serves() -> bool:
                return not (await a.state()).paused

            await fleet.eventually("a serves without the bus", serves)
            await a.serves(version)
            cable.mend()
            await a.completes(version)
            await a.completes((await trainer.publish()).version)


async def test_consumer_ends_at_once_and_its_engine_serves_on_when_the_bus_is_gone_for_good(
    fleet: Fleet,
) -> None:
    engine = await fleet.engine("a")
    async with (
        open_torch_client(engine.directory) as client,
        fleet.watched(client),
        open_cable(fleet.server.url) as cable,
        fleet.publisher() as trainer,
    ):
        settings = structs.replace(fleet.settings, url=cable.url, reconnect_for_s=RECONNECT_FOR_S)
        version = (await trainer.publish()).version
        try:
            async with fleet.follow("a", settings=settings, reader_ttl_s=1, stop_s=NEVER_S) as a:
                await a.completes(version)
                cable.cut()
                await anyio.sleep_forever()
        except* BusUnavailable:
            pass
        await fleet.serves(client, version)

        async def is_missed() -> bool:
            return await fleet.present("a") is None

        await fleet.eventually("the heartbeat of a has run out", is_missed)
