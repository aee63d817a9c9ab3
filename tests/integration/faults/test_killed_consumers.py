"""Consumers that are killed in the middle of a round.

Their engines live on, and must not serve a mix; the other engines finish; whoever comes next finds
out what was left, and goes on from there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.integration.fleet.fleet import Fleet, Follower, Trainer
from tests.integration.fleet.processes import consumer_process
from tests.integration.fleet.signals import stopped
from weightbus.consumers.engines.torch.client import TorchEngineClient, open_torch_client
from weightbus.schemas.rounds import Join, RoundComplete, RoundPlan

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

STATE_S = 60.0


@asynccontextmanager
async def client_of(fleet: Fleet, name: str, ranks: int = 1) -> AsyncIterator[TorchEngineClient]:
    """The users of an engine, who see no mix, whatever becomes of its consumer."""
    engine = await fleet.engine(name, ranks)
    async with open_torch_client(engine.directory) as client, fleet.watched(client):
        yield client


async def bring_to_first_version(fleet: Fleet, trainer: Trainer, name: str, ranks: int = 1) -> int:
    """By a consumer that ends in order."""
    async with fleet.follow(name, ranks=ranks) as follower:
        version = (await trainer.publish()).version
        await follower.completes(version)
    return version


async def test_engine_serves_what_it_served_when_its_consumer_is_killed_before_the_first_write(
    fleet: Fleet,
) -> None:
    async with fleet.publisher() as trainer, client_of(fleet, "a") as client:
        first = await bring_to_first_version(fleet, trainer, "a")
        async with (
            fleet.follow("b") as b,
            consumer_process(fleet, "a", hold="before_apply") as doomed,
        ):
            second = (await trainer.publish()).version
            await doomed.hears("before_apply")
            await doomed.kill()
            state = await client.state(STATE_S)
            assert (state.version, state.paused, state.touched) == (first, True, False)
            await b.completes(second)
            ended = await fleet.log.wait(RoundComplete, version=second)
            assert (ended.completed, ended.failed) == (("b",), {"a": "its consumer is gone"})
            async with fleet.follow("a", hold="before_pause") as a:
                await a.held.reached.wait()
                await a.serves(first)
                a.held.release()
                await a.completes(second)
                await next_version_goes_through(trainer, a, b)


async def test_engine_waits_for_a_proof_when_its_consumer_is_killed_after_the_last_write(
    fleet: Fleet,
) -> None:
    async with fleet.publisher() as trainer, client_of(fleet, "a") as client:
        first = await bring_to_first_version(fleet, trainer, "a")
        async with (
            fleet.follow("b") as b,
            consumer_process(fleet, "a", hold="after_apply") as doomed,
        ):
            second = (await trainer.publish()).version
            await doomed.hears("after_apply")
            await doomed.kill()
            await b.completes(second)
            state = await client.state(STATE_S)
            assert (state.version, state.paused, state.touched) == (first, True, True)
            async with fleet.follow("a", hold="before_apply") as a:
                await a.held.reached.wait()
                assert (await a.state()).paused
                quarantined = await fleet.present("a")
                assert quarantined is not None
                assert (quarantined.status, quarantined.version) == ("quarantined", -1)
                a.held.release()
                await a.completes(second)
                await next_version_goes_through(trainer, a, b)


async def test_engine_serves_no_mix_when_its_consumer_is_killed_while_one_rank_has_written(
    fleet: Fleet,
) -> None:
    async with fleet.publisher() as trainer, client_of(fleet, "t", ranks=2) as client:
        first = await bring_to_first_version(fleet, trainer, "t", ranks=2)
        async with consumer_process(fleet, "t", ranks=2, hold="before_apply") as doomed:
            second = (await trainer.publish()).version
            await doomed.hears("before_apply")
            with stopped((await client.state(STATE_S)).pids[1]):
                doomed.go_on()

                async def one_has_begun() -> bool:
                    return (await client.state(STATE_S)).touched

                await fleet.eventually("rank 0 writes", one_has_begun)
                await doomed.kill()
            state = await client.state(STATE_S)
            assert (state.version, state.paused, state.touched) == (first, True, True)
        async with fleet.follow("t", ranks=2) as t:
            await t.completes(second)
            await next_version_goes_through(trainer, t)


async def test_round_goes_on_when_its_leader_is_killed_before_it_plans(fleet: Fleet) -> None:
    async with fleet.publisher() as trainer:
        await bring_to_first_version(fleet, trainer, "a")
        async with (
            consumer_process(fleet, "a") as leader,
            fleet.follow("b", hold="before_describe") as b,
        ):
            second = (await trainer.publish()).version
            await leads(fleet, "a", second)
            await leader.kill()
            b.held.release()
            await b.completes(second)
            plans = fleet.log.said(RoundPlan, version=second)
            assert {plan.leader for plan in plans} == {"b"}
            async with fleet.follow("a") as a:
                await a.completes(second)
                await next_version_goes_through(trainer, a, b)


async def test_round_is_closed_by_another_when_its_leader_is_killed_after_it_planned(
    fleet: Fleet,
) -> None:
    async with fleet.publisher() as trainer:
        await bring_to_first_version(fleet, trainer, "a")
        async with (
            consumer_process(fleet, "a", hold="before_apply") as leader,
            fleet.follow("b", hold="before_describe") as b,
        ):
            second = (await trainer.publish()).version
            await leads(fleet, "a", second)
            b.held.release()
            await leader.hears("before_apply")
            await b.completes(second)
            await leader.kill()
            ended = await fleet.log.wait(RoundComplete, version=second)
            assert (ended.leader, ended.completed) == ("b", ("b",))
            assert ended.failed == {"a": "its consumer is gone"}
            async with fleet.follow("a") as a:
                await a.completes(second)
                await next_version_goes_through(trainer, a, b)


async def leads(fleet: Fleet, name: str, version: int) -> None:
    """Wait until an engine's consumer has joined the round of a version, and leads it."""
    await fleet.log.wait(Join, engine=name, version=version)

    async def holds() -> bool:
        lease = await fleet.bus.round_leases.holder(fleet.model, f"v{version}")
        return lease is not None and lease.leader == name

    await fleet.eventually(f"{name} leads", holds)


async def next_version_goes_through(trainer: Trainer, *followers: Follower) -> None:
    version = (await trainer.publish()).version
    for follower in followers:
        await follower.completes(version)
