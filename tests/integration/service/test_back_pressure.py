"""A trainer that is faster than a real engine: it goes on, and the engine serves what did come."""

from __future__ import annotations

import pytest

from tests.integration.fleet.fleet import Fleet
from weightbus.producers.errors import SlotBusy, VersionSkipped
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired, CheckpointSkipped
from weightbus.schemas.progress import UpdateFailed

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("when_busy", "error"), [("skip", VersionSkipped), ("fail", SlotBusy)])
async def test_engine_serves_the_version_it_reads_and_the_next_when_the_trainer_does_not_wait(
    fleet: Fleet, when_busy: str, error: type[Exception]
) -> None:
    async with fleet.follow("a") as a, fleet.publisher(when_busy=when_busy) as trainer:
        for _ in range(2):
            await a.completes((await trainer.publish()).version)

        async def released() -> bool:
            leases = fleet.bus.reader_leases
            versions = [ready.version for ready in fleet.log.said(CheckpointReady)]
            return not [v for v in versions if await leases.readers(fleet.model, v)]

        await fleet.eventually("the engine reads nothing", released)
        reading = a.engine.hold("after_apply")
        read = (await trainer.publish()).version
        await reading.reached.wait()
        gone = [retired.version for retired in fleet.log.said(CheckpointRetired)]
        for _ in range(2):
            with pytest.raises(error, match=rf"a \(version {read}\)"):
                await trainer.publish()
        assert [retired.version for retired in fleet.log.said(CheckpointRetired)] == gone
        reading.release()
        await a.completes(read)
        await fleet.eventually("the engine reads nothing", released)
        last = (await trainer.publish()).version
        await a.completes(last)
        skipped = await fleet.log.wait(CheckpointSkipped, version=last - 1)
    assert (skipped.cause, skipped.waited_s) == ("busy", 0.0)
    assert [ready.version for ready in fleet.log.said(CheckpointReady)][-2:] == [read, last]
    assert last == read + 3
    assert fleet.log.said(UpdateFailed) == []
