"""What the consumer of a vLLM engine knows of its ranks without a question: every question is a
call between two steps of the requests that run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
import pytest

from tests.integration.engines.checkpoints import Checkpoints
from tests.integration.engines.harness import LONG_S, Updates
from tests.integration.engines.vllm.conftest import Start
from tests.integration.engines.vllm.server import StandIn
from tests.integration.engines.vllm.test_updates import Gate, opened
from tests.integration.engines.vllm.workers import Executor, StandInHost
from tests.unit.transfer.blocks import Block, open_block
from weightbus.bus.host import host_id
from weightbus.consumers.engines.vllm.engine import VllmEngine
from weightbus.consumers.errors import ApplyFailed, EngineUnavailable, PlanError, WorkerLost
from weightbus.schemas.placement import Segment
from weightbus.schemas.worker import InPlace, Inspected

pytestmark = pytest.mark.anyio

TURN = "POST /update_weights"

Slot = Callable[[], Block]


@pytest.fixture
def slot(checkpoints: Checkpoints) -> Iterator[Slot]:
    """Makes slots of a publisher on this host."""
    with ExitStack() as stack:
        (data,) = checkpoints.segments(0)
        yield lambda: stack.enter_context(open_block(data, host_id()))


def turns(server: StandIn) -> int:
    return server.details().count(TURN)


async def asked(engine: VllmEngine) -> tuple[Inspected, ...]:
    """What ranks say when they are asked."""
    return numbered(await engine.inspect(None, LONG_S))


async def looked(engine: VllmEngine) -> tuple[Inspected, ...]:
    return numbered(await engine.look(LONG_S))


def numbered(ranks: tuple[Inspected, ...]) -> tuple[Inspected, ...]:
    return tuple(msgspec.structs.replace(rank, request=0) for rank in ranks)


async def update(engine: VllmEngine, updates: Updates, version: int, *sources: Segment) -> None:
    """As a route does, from what lies here."""
    digest = updates.checkpoints.layout_digest
    feeds = dict.fromkeys(range(engine.ranks), InPlace(sources=sources))
    while not all(reply.ready for reply in await engine.prepare(digest, feeds, LONG_S)):
        pass
    await engine.pause(LONG_S)
    assert updates.verify(version, await updates.feed(version, feeds)).ok
    await engine.resume(version, LONG_S)


async def test_ranks_are_not_asked_what_they_hold_when_they_have_said_it(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        for version in (1, 2, 3):
            await updates.update(version)
            before = turns(server)
            found = await looked(engine)
            assert turns(server) == before
            assert [rank.version for rank in found] == [version] * 2
            assert [rank.proven for rank in found] == [(checkpoints.layout_digest,)] * 2
            assert found == await asked(engine)


async def test_ranks_are_asked_again_when_a_new_layout_may_have_taken_the_place_of_one(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        before = turns(server)
        assert await looked(engine) == await asked(engine)
        assert turns(server) == before + 2


async def test_ranks_are_asked_again_when_an_update_failed(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        await engine.pause(LONG_S)
        absent = InPlace(sources=(msgspec.structs.replace(checkpoints.sources(2)[0], path="/no"),))
        with pytest.raises(ApplyFailed):
            await updates.feed(2, {0: InPlace(sources=checkpoints.sources(2)), 1: absent})
        found = await looked(engine)
        assert [rank.version for rank in found] == [2, 1]
        assert found == await asked(engine)


async def test_turn_that_failed_leaves_nothing_taken_for_known(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        await engine.pause(LONG_S)
        server.failing[TURN] = "EngineCore is out of sorts"
        with pytest.raises(EngineUnavailable):
            await updates.apply(2)
        with pytest.raises(EngineUnavailable):
            await engine.look(LONG_S)
        server.failing.clear()
        assert await looked(engine) == await asked(engine)


async def test_new_workers_are_seen_when_the_server_was_started_anew(
    start: Start, directory: Path, checkpoints: Checkpoints, slot: Slot
) -> None:
    server, block = start(), slot()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await update(engine, updates, 1, block.write(*checkpoints.segments(1)))
        old = await looked(engine)
        await anyio.to_thread.run_sync(server.restart, Executor(checkpoints))
        new = await looked(engine)
        assert not {rank.instance for rank in old} & {rank.instance for rank in new}
        assert [rank.version for rank in new] == [-1, -1]
        await updates.prepare()
        before = turns(server)
        await update(engine, updates, 2, block.write(*checkpoints.segments(2)))
        assert turns(server) > before + 1, "what was open went with the old ones"
        assert server.executor.fingerprints() == checkpoints.fingerprints(2)


async def test_update_does_not_reach_new_workers_when_it_was_meant_for_the_old(
    start: Start, directory: Path, checkpoints: Checkpoints, slot: Slot
) -> None:
    server, block = start(), slot()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await update(engine, updates, 1, block.write(*checkpoints.segments(1)))
        executor = Executor(checkpoints)
        found = executor.fingerprints()
        await anyio.to_thread.run_sync(server.restart, executor)
        feeds = dict.fromkeys(range(2), InPlace(sources=(block.segment(),)))
        replies = await engine.prepare(checkpoints.layout_digest, feeds, LONG_S)
        assert all(reply.ready for reply in replies), "nobody is asked"
        await engine.pause(LONG_S)
        with pytest.raises((WorkerLost, EngineUnavailable)):
            await updates.feed(1, feeds)
        assert executor.fingerprints() == found
        assert [rank.version for rank in await looked(engine)] == [-1, -1]


async def test_slots_that_are_open_are_not_prepared_again(
    start: Start, directory: Path, checkpoints: Checkpoints, slot: Slot
) -> None:
    """Two slots take turns; each version has a turn of its own, and no other, from the third on."""
    server, slots = start(), (slot(), slot())
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        for version in range(1, 7):
            before = turns(server)
            block = slots[version % 2]
            await update(engine, updates, version, block.write(*checkpoints.segments(version)))
            assert server.executor.fingerprints() == checkpoints.fingerprints(version)
            if version > 2:
                assert turns(server) == before + 1
            else:
                assert turns(server) > before + 1


async def test_slots_are_prepared_again_when_something_else_was_read_meanwhile(
    start: Start, directory: Path, checkpoints: Checkpoints, slot: Slot
) -> None:
    server, block = start(), slot()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await update(engine, updates, 1, block.write(*checkpoints.segments(1)))
        await engine.pause(LONG_S)
        await updates.relay(2, 1 << 16)
        await engine.resume(2, LONG_S)
        before = turns(server)
        await update(engine, updates, 3, block.write(*checkpoints.segments(3)))
        assert turns(server) > before + 1
        assert server.executor.fingerprints() == checkpoints.fingerprints(3)


async def test_cancelled_look_at_new_workers_leaves_nothing_taken_for_known(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """As when a newer version comes while an update is prepared."""
    server, gate = start(), Gate()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        await anyio.to_thread.run_sync(server.restart, Executor(checkpoints))
        server.before[TURN] = gate
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.look, LONG_S)
            await gate.wait()
            tasks.cancel_scope.cancel()
        del server.before[TURN]
        gate.open()
        assert await looked(engine) == await asked(engine)


async def test_number_of_updates_is_told_not_guessed(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """One that was touched and failed counts, too: guessing it, the next transfer that wrote
    nothing would find other contents than before it."""
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        await engine.pause(LONG_S)
        for host in server.executor.hosts:
            fail_at_the_second(host)
        with pytest.raises(ApplyFailed) as failed:
            await updates.apply(2)
        assert failed.value.touched
        await updates.apply(2)
        found = await looked(engine)
        assert [rank.updates for rank in found] == [3, 3]
        assert found == await asked(engine)
        await engine.resume(2, LONG_S)


def fail_at_the_second(host: StandInHost) -> None:
    """Of its next waits for the device: weights may have been written then."""
    waits = iter((host.synchronize, None))

    def synchronize() -> None:
        wait = next(waits, host.synchronize)
        if wait is None:
            vars(host).pop("synchronize")
            raise PlanError("device", "gone", "must answer")
        wait()

    vars(host)["synchronize"] = synchronize


async def test_ranks_are_asked_again_when_one_cannot_say_how_it_is(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """Its weights may have been discarded since."""
    server = start()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        (directory / "worker-1.json").unlink()
        before = turns(server)
        assert await looked(engine) == await asked(engine)
        assert turns(server) == before + 2


async def test_two_that_look_for_a_drafter_do_so_one_after_the_other(
    start: Start, directory: Path, checkpoints: Checkpoints
) -> None:
    """A heartbeat and an update, at a server that was started anew: each ends vLLM's session."""
    server, gate = start(drafts=True), Gate()
    async with opened(server, directory, checkpoints) as (engine, updates):
        await updates.prepare()
        await updates.update(1)
        await anyio.to_thread.run_sync(server.restart, Executor(checkpoints, drafts=True))
        server.late["POST /init_weight_transfer_engine"] = gate
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.state, LONG_S)
            await gate.wait()
            tasks.start_soon(engine.look, LONG_S)
            await anyio.wait_all_tasks_blocked()
            gate.open()
        assert await looked(engine) == await asked(engine)
