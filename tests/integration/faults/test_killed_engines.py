"""Engines whose worker is killed: idle, while it writes, and beside a rank that has written.

An engine starts its ranks anew; they hold nothing. Its consumer brings them to the newest version.
"""

from __future__ import annotations

import anyio
import pytest

from tests.integration.fleet.fleet import Fleet
from tests.integration.fleet.log import DEADLINE_S
from tests.integration.fleet.signals import kill, stopped
from weightbus.consumers.errors import EngineUnavailable
from weightbus.schemas.progress import UpdateComplete, UpdateFailed

pytestmark = pytest.mark.anyio


async def test_engine_is_brought_back_to_its_version_when_its_worker_is_killed_while_idle(
    fleet: Fleet,
) -> None:
    async with fleet.follow("a") as a, fleet.publisher() as trainer:
        version = (await trainer.publish()).version
        await a.completes(version)
        kill((await a.state()).pids[0])
        await fleet.log.wait_until(
            "second UpdateComplete",
            lambda: next(iter(fleet.log.said(UpdateComplete, version=version)[1:]), None),
        )
        await a.serves(version)
        assert fleet.log.said(UpdateFailed) == []
        await a.completes((await trainer.publish()).version)


async def test_engine_comes_back_and_others_finish_when_its_worker_is_killed_while_it_applies(
    fleet: Fleet,
) -> None:
    async with fleet.follow("a") as a, fleet.follow("b") as b, fleet.publisher() as trainer:
        first = (await trainer.publish()).version
        await a.completes(first)
        await b.completes(first)
        hold = a.engine.hold("before_apply")
        second = (await trainer.publish()).version
        await hold.reached.wait()
        pid = (await a.state()).pids[0]
        with stopped(pid):
            hold.release()
            await b.completes(second)
            kill(pid)
        failed = await a.fails(second, "WorkerLost")
        assert failed.quarantined
        await a.completes(second)
        await a.completes((await trainer.publish()).version)


async def test_engine_serves_no_mix_when_a_worker_is_killed_after_another_has_written(
    fleet: Fleet,
) -> None:
    async with fleet.follow("t", ranks=2) as t, fleet.publisher() as trainer:
        first = (await trainer.publish()).version
        await t.completes(first)
        hold = t.engine.hold("before_apply")
        second = (await trainer.publish()).version
        await hold.reached.wait()
        late = (await t.state()).pids[1]
        with stopped(late):
            hold.release()

            async def one_has_begun() -> bool:
                return (await t.state()).touched

            await fleet.eventually("rank 0 writes", one_has_begun)
            kill(late)
        failed = await t.fails(second, "WorkerLost")
        assert (failed.quarantined, failed.served_version) == (True, -1)
        await t.completes(second)
        await t.completes((await trainer.publish()).version)


async def test_consumer_ends_with_the_reason_when_its_engine_is_gone(fleet: Fleet) -> None:
    with pytest.RaisesGroup(EngineUnavailable, flatten_subgroups=True):
        async with fleet.follow("a", engine_lost_s=2.0) as a, fleet.publisher() as trainer:
            await a.completes((await trainer.publish()).version)
            kill((await a.state()).front_pid)
            with anyio.fail_after(DEADLINE_S):
                await anyio.sleep_forever()
    assert await fleet.present("a") is None
