"""Consumers that are told to stop, at rest and in the middle of an update."""

from __future__ import annotations

import pytest

from tests.integration.fleet.fleet import Fleet
from tests.integration.fleet.processes import consumer_process
from tests.integration.fleet.signals import stopped
from weightbus.consumers.engines.torch.client import open_torch_client
from weightbus.consumers.errors import EngineTaken
from weightbus.consumers.service import open_consumer
from weightbus.schemas.progress import UpdateFailed
from weightbus.schemas.rounds import RoundComplete
from weightbus.tracing.telemetry import Telemetry

pytestmark = pytest.mark.anyio

STATE_S = 60.0


async def test_engine_goes_on_serving_when_its_consumer_is_stopped_at_rest(fleet: Fleet) -> None:
    engine = await fleet.engine("a")
    async with (
        fleet.publisher() as trainer,
        open_torch_client(engine.directory) as client,
        fleet.watched(client),
    ):
        async with consumer_process(fleet, "a") as consumer:
            first = (await trainer.publish()).version
            await fleet.completes("a", client, first)
            assert await consumer.stop() == 0
        assert await fleet.present("a") is None
        await fleet.serves(client, first)
        second = (await trainer.publish()).version
        async with fleet.follow("a") as a:
            await a.completes(second)


async def test_second_consumer_of_an_engine_gives_way_to_the_one_that_lives(fleet: Fleet) -> None:
    async with fleet.publisher() as trainer, fleet.follow("a") as a:
        await a.completes((await trainer.publish()).version)
        before = await fleet.present("a")
        with pytest.raises(BaseExceptionGroup) as raised:
            async with open_consumer(
                fleet.config("a"), bus=fleet.bus, engine=a.engine, routes=(), telemetry=Telemetry()
            ):
                raise AssertionError("it has started")
        assert raised.group_contains(EngineTaken)
        after = await fleet.present("a")
        assert before is not None
        assert after is not None
        assert after.consumer == before.consumer
        await a.completes((await trainer.publish()).version)


async def test_engine_serves_what_it_served_when_its_consumer_is_stopped_before_it_wrote(
    fleet: Fleet,
) -> None:
    engine = await fleet.engine("a")
    async with (
        fleet.publisher() as trainer,
        fleet.follow("b") as b,
        open_torch_client(engine.directory) as client,
        fleet.watched(client),
    ):
        async with fleet.follow("a") as a:
            first = (await trainer.publish()).version
            await a.completes(first)
        async with consumer_process(fleet, "a", hold="before_apply") as consumer:
            second = (await trainer.publish()).version
            await consumer.hears("before_apply")
            assert await consumer.stop() == 0
        failed = await fleet.fails("a", second, "TransferCancelled")
        assert (failed.served_version, failed.quarantined) == (first, False)
        await fleet.serves(client, first)
        assert await fleet.present("a") is None
        assert await fleet.bus.reader_leases.readers(fleet.model, second) == ()
        await b.completes(second)
        ended = await fleet.log.wait(RoundComplete, version=second)
        assert (ended.completed, set(ended.failed)) == (("b",), {"a"})
        async with fleet.follow("a") as a:
            await a.completes(second)


async def test_engine_stays_paused_when_its_consumer_is_stopped_after_it_wrote(
    fleet: Fleet,
) -> None:
    async with fleet.publisher() as trainer:
        async with fleet.follow("a") as a:
            first = (await trainer.publish()).version
            await a.completes(first)
            hold = a.engine.hold("after_apply")
            second = (await trainer.publish()).version
            await hold.reached.wait()
        failed = fleet.log.said(UpdateFailed, version=second)[0]
        assert (failed.cause, failed.quarantined) == ("TransferCancelled", True)
        async with fleet.follow("a", hold="before_apply") as a:
            await a.held.reached.wait()
            state = await a.state()
            assert (state.version, state.paused, state.touched) == (first, True, True)
            a.held.release()
            await a.completes(second)


@pytest.mark.parametrize("stop_s", [10.0, 0.5], ids=["in time", "given up"])
async def test_consumer_ends_in_order_when_it_is_stopped_while_a_rank_hangs(
    fleet: Fleet, stop_s: float
) -> None:
    engine = await fleet.engine("t", ranks=2)
    async with (
        fleet.publisher() as trainer,
        open_torch_client(engine.directory) as client,
        fleet.watched(client),
    ):
        async with fleet.follow("t", ranks=2) as t:
            await t.completes((await trainer.publish()).version)
        async with consumer_process(
            fleet, "t", ranks=2, hold="before_apply", stop_s=stop_s
        ) as consumer:
            second = (await trainer.publish()).version
            await consumer.hears("before_apply")
            with stopped((await client.state(STATE_S)).pids[1]):
                consumer.go_on()

                async def one_has_begun() -> bool:
                    return (await client.state(STATE_S)).touched

                await fleet.eventually("rank 0 writes", one_has_begun)
                assert await consumer.stop() == 0
        assert await fleet.present("t") is None
        async with fleet.follow("t", ranks=2) as t:
            await t.completes(second)
