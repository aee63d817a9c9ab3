"""Sources of p2p that go while they are read, and readers with hardly any memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from tests.integration.faults.staged import (
    P2P,
    assert_in_time,
    bring_to_first_version,
    broadcast_begins,
    following,
    publish,
)
from tests.integration.fleet.elsewhere import elsewhere
from tests.integration.fleet.fleet import Fleet
from tests.integration.fleet.processes import Child, trainer_process
from tests.integration.fleet.staging import staged_bytes, turns_of, until_filled
from weightbus.bus.background import open_background
from weightbus.schemas.checkpoint import CheckpointReady, CopyReady
from weightbus.schemas.progress import UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import RoundPlan

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

MEASURE_S = 0.001

SMALL_BYTES = 3 * 2**19
"""Two of the smallest buckets do not fit into what staging may take of it."""


async def publish_by(trainer: Child, fleet: Fleet) -> int:
    version = fleet.next_version()
    await trainer.tell(str(version))
    await fleet.log.wait(CheckpointReady, version=version)
    return version


async def test_reader_goes_on_with_a_copy_when_the_trainer_is_killed_while_it_is_read(
    fleet: Fleet,
) -> None:
    async with (
        trainer_process(fleet, filled=True, p2p=fleet.p2p) as trainer,
        following(fleet, "c", routes=P2P, keep_copy=True) as (c,),
    ):
        async with following(fleet, "b", routes=P2P) as (b,):
            first = await publish_by(trainer, fleet)
            for follower in (b, c):
                await follower.completes(first)
        second = await publish_by(trainer, fleet)
        await c.completes(second)
        await fleet.log.wait(CopyReady, engine="c", version=second)
        async with fleet.follow("b", hold="before_apply", **elsewhere("b", routes=P2P)) as b:
            await b.held.reached.wait()
            await trainer.kill()
            b.held.release()
            done = await b.completes(second)
            assert done.routes == P2P
            assert_in_time(fleet, done)
    assert [failed.reason for failed in fleet.log.said(UpdateFailed)] == []
    async with following(fleet, "b", "c") as followers, fleet.publisher(p2p=fleet.p2p) as other:
        third = await publish(other)
        for follower in followers:
            await follower.completes(third)


async def test_failure_is_named_when_the_only_source_is_killed_while_it_is_read(
    fleet: Fleet,
) -> None:
    async with following(fleet, "b") as (b,):
        async with trainer_process(fleet, filled=True, p2p=fleet.p2p) as trainer:
            first = await publish_by(trainer, fleet)
            await b.completes(first)
            before = turns_of(fleet.model)
            begun = b.engine.hold("before_apply")
            second = await publish_by(trainer, fleet)
            await begun.reached.wait()
            await until_filled(fleet.model, 1, after=before)
            await trainer.kill()
            begun.release()
            failed = await b.fails(second, "SegmentUnavailable")
            assert failed.engine == "b"
        async with fleet.publisher(p2p=fleet.p2p) as other:
            await b.completes(await publish(other))
    assert fleet.log.said(UpdateComplete, version=second) == []


@asynccontextmanager
async def measured(fleet: Fleet) -> AsyncIterator[list[int]]:
    """What all staging blocks together take, again and again; at the end the most of it."""
    seen = [0]

    async def measure() -> None:
        while True:
            seen[0] = max(seen[0], staged_bytes(fleet.model))
            await anyio.sleep(MEASURE_S)

    async with open_background() as tasks:
        tasks.start_soon(measure)
        yield seen


@pytest.mark.parametrize(("name", "ranks"), [("b", 1), ("t", 2)])
async def test_version_is_pulled_within_the_bound_when_two_buckets_do_not_fit(
    fleet: Fleet, name: str, ranks: int
) -> None:
    bound = ranks * SMALL_BYTES
    async with (
        fleet.publisher(p2p=fleet.p2p) as trainer,
        following(fleet, name, ranks=ranks, routes=P2P, staging_bytes=bound) as (follower,),
        measured(fleet) as most,
    ):
        for _ in range(3):  # the first by windows, the others by buckets
            assert (await follower.completes(await publish(trainer))).routes == P2P
    assert 0 < most[0] <= bound


async def test_broadcast_takes_turns_within_the_bound_when_two_buckets_do_not_fit(
    fleet: Fleet,
) -> None:
    async with fleet.publisher(p2p=fleet.p2p) as trainer:
        await bring_to_first_version(fleet, trainer, "b", "c")
        async with (
            following(fleet, "b", "c", staging_bytes=SMALL_BYTES) as followers,
            measured(fleet) as most,
        ):
            second = await publish(trainer)
            await broadcast_begins(fleet, second, "b", "c")
            for follower in followers:
                await follower.completes(second)
            assert (await fleet.log.wait(RoundPlan, version=second)).slots == 1
    assert 0 < most[0] <= len(followers) * SMALL_BYTES
