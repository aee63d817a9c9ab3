"""Members of a broadcast that are killed, or stand still, while its buckets are under way.

No engine serves a mix; the others finish this version within its deadline; the lost one is named,
and catches up by p2p when it comes back.
"""

from __future__ import annotations

import pytest

from tests.integration.faults.staged import (
    BROADCAST,
    P2P,
    assert_in_time,
    bring_to_first_version,
    broadcast_begins,
    client_of,
    following,
    held_member,
    publish,
)
from tests.integration.fleet.fleet import Fleet, Follower, Trainer
from tests.integration.fleet.signals import kill, stopped
from tests.integration.fleet.staging import turns_of, until_filled
from weightbus.schemas.rounds import RoundComplete, RoundPlan

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


async def next_version_is_broadcast(trainer: Trainer, *followers: Follower) -> None:
    version = await publish(trainer)
    for follower in followers:
        assert (await follower.completes(version)).routes == BROADCAST


async def test_survivor_finishes_and_the_lost_one_catches_up_when_a_member_is_killed(
    fleet: Fleet,
) -> None:
    async with fleet.publisher(p2p=fleet.p2p) as trainer, client_of(fleet, "b"):
        await bring_to_first_version(fleet, trainer, "b", "c")
        async with following(fleet, "c") as (c,):
            async with held_member(fleet, "b") as doomed:
                before = turns_of(fleet.model)
                second = await publish(trainer)
                await broadcast_begins(fleet, second, "b", "c")
                await doomed.hears("before_apply")
                await until_filled(fleet.model, 1, after=before)
                await doomed.kill()
                assert_in_time(fleet, await c.completes(second))
            ended = await fleet.log.wait(RoundComplete, version=second)
            assert (ended.completed, set(ended.failed)) == (("c",), {"b"})
            async with following(fleet, "b") as (b,):
                assert (await b.completes(second)).routes == P2P
                await next_version_is_broadcast(trainer, b, c)


async def test_survivor_finishes_and_the_lost_one_catches_up_when_a_member_stands_still(
    fleet: Fleet,
) -> None:
    async with fleet.publisher(p2p=fleet.p2p) as trainer, client_of(fleet, "b") as client:
        await bring_to_first_version(fleet, trainer, "b", "c")
        async with following(fleet, "c") as (c,), held_member(fleet, "b") as sleeper:
            second = await publish(trainer)
            await broadcast_begins(fleet, second, "b", "c")
            await sleeper.hears("before_apply")
            with stopped(sleeper.pid):
                assert_in_time(fleet, await c.completes(second))
                ended = await fleet.log.wait(RoundComplete, version=second)
                assert (ended.completed, set(ended.failed)) == (("c",), {"b"})
            sleeper.go_on()
            late = await fleet.completes("b", client, second)
            assert late.routes == P2P
            third = await publish(trainer)
            assert (await c.completes(third)).routes == BROADCAST
            await fleet.completes("b", client, third)


async def test_survivor_finishes_when_the_worker_of_a_member_is_killed_while_it_reads(
    fleet: Fleet,
) -> None:
    async with fleet.publisher(p2p=fleet.p2p) as trainer:
        await bring_to_first_version(fleet, trainer, "b", "c")
        async with following(fleet, "b", "c") as (b, c):
            hold = b.engine.hold("before_apply")
            second = await publish(trainer)
            await hold.reached.wait()
            await broadcast_begins(fleet, second, "b", "c")
            pid = (await b.state()).pids[0]
            with stopped(pid):
                hold.release()
                kill(pid)
            assert_in_time(fleet, await c.completes(second))
            await fleet.completes("b", b.client, second)
            third = await publish(trainer)
            for follower in (b, c):
                await follower.completes(third)


async def test_newcomer_takes_p2p_and_the_next_broadcast_when_it_joins_during_one(
    fleet: Fleet,
) -> None:
    async with fleet.publisher(p2p=fleet.p2p) as trainer:
        await bring_to_first_version(fleet, trainer, "b", "c")
        async with following(fleet, "b", "c") as (b, c):
            hold = b.engine.hold("before_pause")
            second = await publish(trainer)
            await hold.reached.wait()
            async with following(fleet, "d") as (d,):
                assert (await d.completes(second)).routes == P2P
                hold.release()
                for follower in (b, c):
                    assert (await follower.completes(second)).routes == BROADCAST
                third = await publish(trainer)
                for follower in (b, c, d):
                    assert (await follower.completes(third)).routes == BROADCAST
                plan = await fleet.log.wait(RoundPlan, version=third)
                members = {member.engine for group in plan.groups for member in group.members}
                assert members == {"b", "c", "d"}
