"""A publisher of one rank on a real bus: what readers find, and what they are protected from."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import anyio.to_thread
import numpy as np
import pytest
import torch

from tests.integration.producers.reader import (
    MappedBlock,
    blocks_of,
    digest_of_model,
    next_message,
    read_checkpoint,
)
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus
from weightbus.bus.digest import digest_tensor
from weightbus.bus.errors import ObjectMissing, SharedMemoryFull
from weightbus.producers.errors import (
    PublisherClosed,
    RankInvalid,
    SlotBusy,
    TensorInvalid,
    VersionNotNew,
)
from weightbus.producers.publisher import PublisherOptions, open_publisher
from weightbus.producers.shards import Shard
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.leases import ReaderLease
from weightbus.schemas.placement import SharedMemorySegment
from weightbus.schemas.progress import EngineState
from weightbus.tracing.context import SpanRef
from weightbus.tracing.telemetry import Telemetry

pytestmark = pytest.mark.anyio

QUICK = PublisherOptions(slot_wait_s=0.2, close_wait_s=0.2)


def weights(seed: int, rows: int = 300) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embed = torch.randn(rows, 16, generator=generator).bfloat16()
    return {
        "model.embed.weight": embed,
        "lm_head.weight": embed,
        "model.norm.weight": torch.randn(16, generator=generator),
        "model.t.weight": torch.randn(16, 7, generator=generator).t(),
        "model.step": torch.tensor(seed),
        "model.empty": torch.zeros(0, 3),
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def lease(model: str, version: int, engine: str = "a") -> ReaderLease:
    return ReaderLease(model=model, version=version, engine=engine, consumer="c")


def block_names(model: str) -> set[str]:
    return {path.name for path in Path("/dev/shm").glob(f"weightbus-{model}.*")}


async def retired(bus: Bus, model: str) -> CheckpointRetired | None:
    last = await bus.last(CheckpointRetired, model=model)
    return None if last is None else last.message


async def test_reader_finds_every_bit_when_versions_follow_each_other(bus: Bus, model: str) -> None:
    async with open_publisher(bus, model) as publisher:
        for version in range(5):
            tensors = weights(version)
            ready = await publisher.publish(tensors, version, {"step": str(version)})
            last = await bus.last(CheckpointReady, model=model)
            assert last is not None
            assert last.message == ready
            assert ready.metadata == {"step": str(version)}
            assert same(await read_checkpoint(bus, ready), tensors)
            assert ready.weights_digest == digest_of_model(tensors.values())


async def test_reader_finds_the_version_before_when_a_newer_one_is_there(
    bus: Bus, model: str
) -> None:
    async with open_publisher(bus, model) as publisher:
        first = await publisher.publish(weights(1), 1)
        second = await publisher.publish(weights(2), 2)
        assert first.layout_digest == second.layout_digest
        assert same(await read_checkpoint(bus, first), weights(1))
        assert same(await read_checkpoint(bus, second), weights(2))


async def test_tensor_digests_are_stored_and_dropped_when_versions_grow_old(
    bus: Bus, model: str
) -> None:
    async with open_publisher(bus, model) as publisher:
        events = [await publisher.publish(weights(version), version) for version in range(4)]
        for version in (2, 3):
            key = events[version].tensor_digests
            assert key is not None
            found = np.frombuffer(await bus.objects.get(key), dtype="<u8").tolist()
            raw = [t.contiguous().flatten().view(torch.uint8) for t in weights(version).values()]
            assert found == [digest_tensor(data.numpy()) for data in raw]
        for version in (0, 1):
            key = events[version].tensor_digests
            assert key is not None
            with pytest.raises(ObjectMissing):
                await bus.objects.get(key)


async def test_tensor_digests_are_kept_when_two_versions_have_the_same(
    bus: Bus, model: str
) -> None:
    async with open_publisher(bus, model) as publisher:
        for version in range(4):
            ready = await publisher.publish(weights(7), version)
        assert ready.tensor_digests is not None
        assert await bus.objects.get(ready.tensor_digests)


async def test_tensor_digests_are_kept_when_another_model_drops_its_own_of_the_same(
    bus: Bus, model: str
) -> None:
    async with open_publisher(bus, model) as one, open_publisher(bus, f"{model}-b") as other:
        kept = await one.publish(weights(1), 1)
        for version in range(1, 5):
            await other.publish(weights(min(version, 2)), version)
        assert kept.tensor_digests is not None
        assert await bus.objects.get(kept.tensor_digests)


async def test_generation_grows_and_a_torn_read_is_seen_when_a_slot_is_written_again(
    bus: Bus, model: str
) -> None:
    async with open_publisher(bus, model) as publisher:
        (block,) = blocks_of(await publisher.publish(weights(1), 1))
        await publisher.publish(weights(2), 2)
        assert block.is_whole
        (again,) = blocks_of(await publisher.publish(weights(3), 3))
        assert not block.is_whole
        assert block.generation == again.promised > block.promised


async def test_blocks_are_kept_when_the_layout_is_the_same_and_made_anew_when_not(
    bus: Bus, model: str
) -> None:
    async with open_publisher(bus, model) as publisher:
        names, generations, digests = [], [], []
        for version, rows in enumerate((300, 300, 300, 700, 700, 700, 10)):
            ready = await publisher.publish(weights(version, rows), version)
            (segment,) = (way for ways in ready.placement for way in ways)
            assert isinstance(segment, SharedMemorySegment)
            names.append(segment.name)
            generations.append(segment.generation)
            digests.append(ready.layout_digest)
            assert same(await read_checkpoint(bus, ready), weights(version, rows))
        assert names[0] == names[2]
        assert len(set(names)) == 5
        assert names[3] == names[5]
        assert generations[2] < generations[4] < generations[6]
        assert len(set(digests)) == 3
        assert block_names(model) == {names[5], names[6]}


async def test_publish_refuses_a_version_that_is_not_new(bus: Bus, model: str) -> None:
    async with open_publisher(bus, model) as publisher:
        await publisher.publish(weights(1), 3)
        for version in (3, 2):
            with pytest.raises(VersionNotNew) as refused:
                await publisher.publish(weights(2), version)
            assert refused.value.newest == 3
        async with open_publisher(bus, model, producer="another") as another:
            with pytest.raises(VersionNotNew, match="which trainer has used"):
                await another.publish(weights(2), 3)
        await publisher.publish(weights(2), 4)


async def test_publish_works_again_when_its_input_was_refused(bus: Bus, model: str) -> None:
    async with open_publisher(bus, model) as publisher:
        first = await publisher.publish(weights(1), 1)
        with pytest.raises(TensorInvalid):
            await publisher.publish({"w": torch.zeros(1, device="meta")}, 2)
        with pytest.raises(MessageInvalid, match="version"):
            await publisher.publish(weights(2), -1)
        with pytest.raises(MessageInvalid, match="metadata"):
            await publisher.publish(weights(2), 2, {"k": "v" * 5000})
        rows = [Shard("w", torch.zeros(2), (3,), (n,)) for n in (0, 1)]
        with pytest.raises(MessageInvalid, match="overlaps"):
            await publisher.publish(rows, 2)
        with pytest.raises(MessageInvalid, match="every element"):
            await publisher.publish([Shard("w", torch.zeros(2), (4,), (0,))], 2)
        assert same(await read_checkpoint(bus, first), weights(1))
        assert await retired(bus, model) is None
        second = await publisher.publish(weights(2), 2)
        assert same(await read_checkpoint(bus, second), weights(2))


async def test_publish_names_need_and_have_when_shared_memory_is_full(bus: Bus, model: str) -> None:
    room = os.statvfs("/dev/shm")
    have_bytes = room.f_bavail * room.f_frsize
    huge = torch.zeros(1, dtype=torch.uint8).expand(have_bytes + 2**20)
    async with open_publisher(bus, model) as publisher:
        first = await publisher.publish(weights(1), 1)
        second = await publisher.publish(weights(2), 2)
        with pytest.raises(SharedMemoryFull) as full:
            await publisher.publish({"huge": huge}, 3)
        assert full.value.need_bytes > have_bytes
        assert await retired(bus, model) is None
        assert same(await read_checkpoint(bus, first), weights(1))
        assert same(await read_checkpoint(bus, second), weights(2))
        await publisher.publish(weights(3), 3)


async def test_publish_waits_for_a_reader_when_it_holds_a_lease(bus: Bus, model: str) -> None:
    done = False
    async with open_publisher(bus, model) as publisher, anyio.create_task_group() as tasks:
        (block,) = blocks_of(await publisher.publish(weights(1), 1))
        await publisher.publish(weights(2), 2)
        await bus.reader_leases.take(lease(model, 1), 30)

        async def publish() -> None:
            nonlocal done
            await publisher.publish(weights(3), 3)
            done = True

        async with bus.subscribe(CheckpointRetired, model=model) as messages:
            tasks.start_soon(publish)
            heard = await next_message(messages)
        assert heard.message.version == 1
        assert block.is_whole
        assert not done
        await bus.reader_leases.release(lease(model, 1))
    assert done
    assert not block.is_whole


@pytest.mark.parametrize("read", [1, 2])
async def test_publish_names_readers_when_they_do_not_end(bus: Bus, model: str, read: int) -> None:
    async with open_publisher(bus, model, options=QUICK) as publisher:
        first = await publisher.publish(weights(1), 1)
        second = await publisher.publish(weights(2), 2)
        await bus.reader_leases.take(lease(model, read, "slow"), 30)
        with pytest.raises(SlotBusy, match=rf"slow \(version {read}\)") as busy:
            await publisher.publish(weights(3), 3)
        assert busy.value.version == 1
        found = await retired(bus, model)
        assert found is not None
        assert found.version == 1
        assert same(await read_checkpoint(bus, first), weights(1))
        assert same(await read_checkpoint(bus, second), weights(2))
        await bus.reader_leases.release(lease(model, read, "slow"))
        third = await publisher.publish(weights(3), 3)
        assert same(await read_checkpoint(bus, third), weights(3))


async def test_publish_goes_on_when_a_lease_runs_out(bus: Bus, model: str) -> None:
    options = PublisherOptions(slot_wait_s=30)
    async with open_publisher(bus, model, options=options) as publisher:
        for version in (1, 2):
            await publisher.publish(weights(version), version)
        await bus.reader_leases.take(lease(model, 1), 1)
        third = await publisher.publish(weights(3), 3)
        assert same(await read_checkpoint(bus, third), weights(3))


async def test_slot_is_unreadable_and_used_again_when_publish_is_cancelled_in_the_copy(
    bus: Bus, model: str
) -> None:
    big = {f"t{n}": torch.full((2**20,), n, dtype=torch.uint8) for n in range(200)}
    async with open_publisher(bus, model) as publisher:
        (block,) = blocks_of(await publisher.publish(big, 1))
        second = await publisher.publish(big, 2)

        async def cancel_once_odd(scope: anyio.CancelScope) -> None:
            while block.generation % 2 == 0:
                await anyio.lowlevel.checkpoint()
            scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancel_once_odd, tasks.cancel_scope)
            await publisher.publish(big, 3)
            raise AssertionError("the copy was faster than the cancellation")
        assert block.generation % 2 == 1
        assert all(whole.is_whole for whole in blocks_of(second))
        last = await bus.last(CheckpointReady, model=model)
        assert last is not None
        assert last.message.version == 2
        (again,) = blocks_of(await publisher.publish(big, 3))
        assert again.is_whole
        assert again.generation == block.generation


async def test_close_retires_in_order_and_removes_blocks_when_it_ends_well(
    bus: Bus, model: str
) -> None:
    async with bus.subscribe(CheckpointRetired, model=model) as messages:
        async with open_publisher(bus, model) as publisher:
            for version in (1, 2, 3):
                ready = await publisher.publish(weights(version), version)
        versions = [(await next_message(messages)).message.version for _ in range(3)]
    assert versions == [1, 2, 3]
    (segment,) = (way for ways in ready.placement for way in ways)
    assert isinstance(segment, SharedMemorySegment)
    with pytest.raises(FileNotFoundError):
        MappedBlock(segment)
    with pytest.raises(PublisherClosed):
        await publisher.publish(weights(4), 4)


async def test_close_leaves_a_mapped_block_whole_when_its_reader_does_not_end(
    bus: Bus, model: str
) -> None:
    async with open_publisher(bus, model, options=QUICK) as publisher:
        ready = await publisher.publish(weights(1), 1)
        (block,) = blocks_of(ready)
        before = block.data
        await bus.reader_leases.take(lease(model, 1), 30)
    assert block.is_whole
    assert block.data == before
    last = await retired(bus, model)
    assert last is not None
    assert (last.version, last.active_readers) == (1, 1)


async def test_close_cleans_up_when_the_trainer_raises(bus: Bus, model: str) -> None:
    async def train() -> None:
        async with open_publisher(bus, model) as publisher:
            await publisher.publish(weights(1), 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await train()
    last = await retired(bus, model)
    assert last is not None
    assert last.version == 1


async def test_close_lingers_until_engines_serve_the_newest_version(bus: Bus, model: str) -> None:
    def state(version: int) -> EngineState:
        return EngineState(
            model=model, engine="a", consumer="c", host_id="h", status="serving", version=version
        )

    options = PublisherOptions(linger_s=60)
    await bus.presence.put(state(0))
    async with (
        anyio.create_task_group() as tasks,
        bus.subscribe(CheckpointRetired, model=model) as messages,
    ):
        async with open_publisher(bus, model, options=options) as publisher:
            await publisher.publish(weights(1), 1)
            tasks.start_soon(bus.presence.put, state(1))
        assert (await next_message(messages)).message.version == 1


async def test_engines_that_are_behind_at_the_end_are_named(
    bus: Bus, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = EngineState(
        model=model, engine="slow", consumer="c", host_id="h", status="serving", version=0
    )
    await bus.presence.put(state)
    async with open_publisher(bus, model, options=PublisherOptions(linger_s=0.2)) as publisher:
        await publisher.publish(weights(1), 1)
    assert "slow" in caplog.text


async def test_trainer_s_own_error_is_the_one_that_is_raised_when_the_bus_is_gone_too(
    bus: Bus, nats_server: NatsServer, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def train() -> None:
        async with open_publisher(bus, model, options=QUICK) as publisher:
            await publisher.publish(weights(1), 1)
            await anyio.to_thread.run_sync(nats_server.kill)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await train()
    assert "did not end well" in caplog.text


async def test_event_carries_the_trace_when_it_is_published(bus: Bus, model: str) -> None:
    async with (
        bus.subscribe(CheckpointReady, model=model) as messages,
        open_publisher(bus, model, telemetry=Telemetry()) as publisher,
    ):
        await publisher.publish(weights(1), 1)
        heard = await next_message(messages)
        assert SpanRef.from_headers(heard.headers) is not None


async def test_opening_is_refused_when_rank_or_names_are_wrong(bus: Bus, model: str) -> None:
    with pytest.raises(RankInvalid, match="rank is 2"):
        async with open_publisher(bus, model, rank=2, world_size=2):
            pass
    with pytest.raises(MessageInvalid):
        async with open_publisher(bus, "a.b"):
            pass
    with pytest.raises(MessageInvalid):
        async with open_publisher(bus, model, producer="*"):
            pass
