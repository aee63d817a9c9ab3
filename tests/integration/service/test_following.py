"""Engines follow a trainer: every version arrives, proven, whoever else is there."""

from __future__ import annotations

import pytest
from msgspec import structs

from tests.integration.faults.staged import (
    BROADCAST,
    bring_to_first_version,
    following,
    publish,
)
from tests.integration.fleet.fleet import Fleet, open_fleet
from tests.integration.fleet.log import DEADLINE_S
from weightbus.consumers.engines.torch.messages import Inputs
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.progress import FirstToken, StageComplete, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Commit, Join, Proven, RoundComplete, RoundPlan

pytestmark = pytest.mark.anyio


async def test_engines_serve_every_version_when_two_follow(fleet: Fleet) -> None:
    async with fleet.follow("a") as a, fleet.follow("b") as b, fleet.publisher() as trainer:
        for _ in range(3):
            version = (await trainer.publish()).version
            await a.completes(version)
            await b.completes(version)
            ended = await fleet.log.wait(RoundComplete, version=version)
            assert (ended.completed, ended.failed) == (("a", "b"), {})
    assert fleet.log.said(UpdateFailed) == []


async def test_engines_of_other_widths_take_one_version_in_one_round(fleet: Fleet) -> None:
    async with (
        fleet.follow("a") as a,
        fleet.follow("t", ranks=2) as t,
        fleet.publisher() as trainer,
    ):
        for _ in range(2):
            version = (await trainer.publish()).version
            await a.completes(version)
            await t.completes(version)
            plan = await fleet.log.wait(RoundPlan, version=version)
            widths = {part.engine: len(part.ranks) for part in plan.engines}
            assert (plan.round, widths) == (f"v{version}", {"a": 1, "t": 2})
            ranks = [s.rank for s in fleet.log.said(StageComplete, engine="t", stage="reload")]
            assert ranks[-2:] == [0, 1]


async def test_engines_keep_to_their_model_when_two_share_a_bus(fleet: Fleet) -> None:
    async with (
        open_fleet(fleet.server, fleet.engines, fleet.directory) as other,
        fleet.follow("a") as a,
        other.follow("b") as b,
        fleet.publisher() as trainer,
        other.publisher() as other_trainer,
    ):
        for _ in range(2):
            first = (await trainer.publish()).version
            second = (await other_trainer.publish()).version
            await a.completes(first)
            await b.completes(second)
    assert {done.engine for done in fleet.log.said(UpdateComplete)} == {"a"}
    assert {done.engine for done in other.log.said(UpdateComplete)} == {"b"}


async def test_an_engine_that_comes_late_takes_the_newest_version_only(fleet: Fleet) -> None:
    async with fleet.publisher() as trainer:
        old, new = [(await trainer.publish()).version for _ in range(2)]
        async with fleet.follow("a") as a:
            await a.completes(new)
    assert fleet.log.said(Join, version=old) == []


async def test_nothing_happens_when_a_version_is_said_twice(fleet: Fleet) -> None:
    async with fleet.follow("a") as a, fleet.publisher() as trainer:
        ready = await trainer.publish()
        await a.completes(ready.version)
        await fleet.say(ready)
        await fleet.say(structs.replace(ready, producer="echo"))
        await a.completes((await trainer.publish()).version)
    assert len(fleet.log.said(CheckpointReady, version=ready.version)) == 2
    assert len(fleet.log.said(UpdateComplete, version=ready.version)) == 1
    assert fleet.log.said(UpdateFailed) == []


async def test_version_is_refused_by_name_when_it_is_older_than_the_one_served(
    fleet: Fleet,
) -> None:
    older = fleet.next_version()
    async with fleet.follow("a") as a, fleet.publisher() as trainer:
        ready = await trainer.publish()
        await a.completes(ready.version)
        late = structs.replace(
            ready, version=older, producer="other", created_ns=ready.created_ns + 1
        )
        await fleet.say(late)
        failed = await a.fails(older, "VersionNotNew")
        assert f"is older than version {ready.version}" in failed.reason
        assert (failed.served_version, failed.quarantined) == (ready.version, False)
        await fleet.say(late)
        await a.completes((await trainer.publish()).version)
    assert len(fleet.log.said(UpdateFailed)) == 1
    assert fleet.log.said(Join, version=older) == []
    assert fleet.log.said(UpdateComplete, version=older) == []


async def test_leases_end_with_the_update_so_that_a_slot_can_be_written_at_once(
    fleet: Fleet,
) -> None:
    async with fleet.follow("a", reader_ttl_s=600) as a, fleet.publisher() as trainer:
        versions = []
        for _ in range(4):  # from the third on a slot is written again
            versions.append((await trainer.publish()).version)
            await a.completes(versions[-1])

        async def released() -> bool:
            return not await fleet.bus.reader_leases.readers(fleet.model, versions[-1])

        await fleet.eventually("the lease of the newest version is released", released)
    retired = fleet.log.said(CheckpointRetired)
    assert [(gone.version, gone.active_readers) for gone in retired] == [(v, 0) for v in versions]


async def test_no_engine_serves_before_all_are_proven_when_they_commit_together(
    fleet: Fleet,
) -> None:
    async with (
        fleet.follow("a", commit="together") as a,
        fleet.follow("b", commit="together") as b,
        fleet.publisher() as trainer,
    ):
        first = (await trainer.publish()).version
        await a.completes(first)
        await b.completes(first)
        unproven = b.engine.hold("after_apply")
        second = (await trainer.publish()).version
        await unproven.reached.wait()
        await fleet.log.wait(Proven, engine="a", version=second)
        states = [await one.state() for one in (a, b)]
        assert [(state.paused, state.version) for state in states] == [(True, first)] * 2
        assert fleet.log.said(Commit, version=second) == []
        unproven.release()
        await a.completes(second)
        await b.completes(second)
    commit = fleet.log.position(await fleet.log.wait(Commit, version=second))
    for engine in ("a", "b"):
        proven = fleet.log.said(Proven, engine=engine, version=second)[0]
        done = fleet.log.said(UpdateComplete, engine=engine, version=second)[0]
        assert fleet.log.position(proven) < commit < fleet.log.position(done)


async def test_first_token_is_said_of_every_version_when_requests_come(fleet: Fleet) -> None:
    prompt = Inputs(prompts=((1, 2, 3),), new_tokens=2)
    async with fleet.follow("a") as a, fleet.publisher() as trainer:
        for _ in range(2):
            version = (await trainer.publish()).version
            done = await a.completes(version)
            answer = await a.client.infer(prompt, DEADLINE_S)
            assert answer.version == version
            said = await fleet.log.wait(FirstToken, engine="a", version=version)
            assert (said.round, said.trace_id) == (f"v{version}", done.trace_id)
            assert done.start_ns <= said.start_ns <= said.end_ns
            assert said.resolution_ns == 0, "its front knows"
    assert len(fleet.log.said(FirstToken)) == 2


async def test_first_token_is_not_said_when_nobody_asks_before_the_next_version(
    fleet: Fleet,
) -> None:
    async with fleet.follow("a") as a, fleet.publisher() as trainer:
        for _ in range(2):
            await a.completes((await trainer.publish()).version)
    assert fleet.log.said(FirstToken) == []


async def test_every_bucket_of_a_broadcast_is_told(fleet: Fleet) -> None:
    async with fleet.publisher(p2p=fleet.p2p) as trainer:
        await bring_to_first_version(fleet, trainer, "b", "c")
        async with following(fleet, "b", "c") as followers:
            version = await publish(trainer)
            for follower in followers:
                assert (await follower.completes(version)).routes == BROADCAST
                told = {
                    stage: await fleet.log.wait(
                        StageComplete, engine=follower.name, version=version, stage=stage
                    )
                    for stage in ("fetch", "broadcast", "reload")
                }
                for stage, said in told.items():
                    assert len(said.buckets) > 1, stage
                    assert sum(bucket.bytes for bucket in said.buckets) == said.bytes
                    starts = [bucket.start_ns for bucket in said.buckets]
                    assert starts == sorted(starts)
                    assert said.start_ns <= starts[0]
                    assert max(bucket.end_ns for bucket in said.buckets) <= said.end_ns
                    assert all(bucket.start_ns <= bucket.end_ns for bucket in said.buckets)
                assert told["broadcast"].start_ns == told["broadcast"].buckets[0].start_ns
