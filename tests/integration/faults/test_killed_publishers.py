"""Publishers that are killed, or end, while engines are late."""

from __future__ import annotations

import anyio
import pytest

from tests.integration.fleet.fleet import SHM, Fleet
from tests.integration.fleet.held import Hold
from tests.integration.fleet.log import DEADLINE_S
from tests.integration.fleet.processes import trainer_process
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.placement import SharedMemorySegment
from weightbus.schemas.progress import UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Join

pytestmark = pytest.mark.anyio


async def publish_and_die(fleet: Fleet) -> int:
    """A trainer is killed as soon as its version is on the bus."""
    version = fleet.next_version()
    async with trainer_process(fleet) as trainer:
        await trainer.tell(str(version))
        await fleet.log.wait(CheckpointReady, version=version)
        await trainer.kill()
    assert len(fleet.blocks()) == 1, "a killed trainer leaves its block to the next one"
    return version


async def test_engine_takes_a_version_when_its_publisher_was_killed_before_anyone_read(
    fleet: Fleet,
) -> None:
    version = await publish_and_die(fleet)
    async with fleet.follow("a") as a:
        await a.completes(version)
        async with fleet.publisher() as trainer:
            await fleet.log.wait(CheckpointRetired, version=version, reason="its publisher died")
            await a.serves(version)
            await a.completes((await trainer.publish()).version)


async def test_nobody_reads_a_version_when_its_block_went_with_its_publisher(
    fleet: Fleet,
) -> None:
    version = await publish_and_die(fleet)
    async with fleet.publisher() as trainer, fleet.follow("a") as a:
        await a.completes((await trainer.publish()).version)
    assert fleet.log.said(Join, version=version) == []
    assert fleet.log.said(UpdateComplete, version=version) == []


async def test_failure_is_named_when_a_block_goes_while_the_engine_prepares(fleet: Fleet) -> None:
    async with fleet.follow("a", hold="before_describe") as a:
        version = await publish_and_die(fleet)
        await a.held.reached.wait()
        async with fleet.publisher() as trainer:  # removes the block and retires the version
            failed = await a.fails(version, "VersionRetired")
            assert "its publisher died" in failed.reason
            a.held.release()
            await a.completes((await trainer.publish()).version)


async def test_failure_is_named_when_a_block_is_gone_and_nobody_says_so(fleet: Fleet) -> None:
    async with fleet.follow("a") as a, fleet.follow("b") as b, fleet.publisher() as trainer:
        first = (await trainer.publish()).version
        for follower in (a, b):
            await follower.completes(first)
        hold = a.engine.hold("before_pause")
        ready = await trainer.publish()
        await hold.reached.wait()
        await b.completes(ready.version)
        ((segment,),) = ready.placement
        assert isinstance(segment, SharedMemorySegment)
        (SHM / segment.name).unlink()
        hold.release()
        failed = await a.fails(ready.version, "SegmentUnavailable")
        assert (failed.served_version, failed.quarantined) == (first, False)
        assert segment.name in failed.reason
        await a.serves(first)
        version = (await trainer.publish()).version
        for follower in (a, b):
            await follower.completes(version)


async def test_publisher_waits_for_an_engine_that_is_late_before_it_ends(fleet: Fleet) -> None:
    async with fleet.follow("a") as a, anyio.create_task_group() as tasks:
        async with fleet.publisher(close_wait_s=DEADLINE_S) as trainer:
            first = (await trainer.publish()).version
            await a.completes(first)
            hold = a.engine.hold("before_apply")
            second = (await trainer.publish()).version
            await hold.reached.wait()
            tasks.start_soon(release_once_retired, fleet, second, hold)
        assert fleet.blocks() == []
        await a.completes(second)
    gone = fleet.log.said(CheckpointRetired, version=second)
    assert [retired.active_readers for retired in gone] == [0]
    assert fleet.log.said(UpdateFailed) == []


async def release_once_retired(fleet: Fleet, version: int, hold: Hold) -> None:
    await fleet.log.wait(CheckpointRetired, version=version)
    hold.release()


async def test_engine_keeps_what_it_serves_when_its_publisher_ends_without_waiting(
    fleet: Fleet,
) -> None:
    async with fleet.follow("a") as a:
        async with fleet.publisher(close_wait_s=0) as trainer:
            first = (await trainer.publish()).version
            await a.completes(first)
            hold = a.engine.hold("before_pause")
            second = (await trainer.publish()).version
            await hold.reached.wait()
        gone = await fleet.log.wait(CheckpointRetired, version=second, active_readers=1)
        assert "after waiting 0 s" in gone.reason
        hold.release()
        await a.fails(second, "SegmentUnavailable")
        await a.serves(first)
        async with fleet.publisher() as trainer:
            await a.completes((await trainer.publish()).version)
