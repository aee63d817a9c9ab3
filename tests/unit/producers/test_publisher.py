"""A publisher of one rank on a bus that fails: which slot is written, and who is told."""

from __future__ import annotations

import threading
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
import torch
from msgspec import structs

from tests.unit.producers.fake_devices import FakeDevices
from tests.unit.producers.fakes import FakeBus
from weightbus.bus.errors import BusTimeout
from weightbus.producers import lifetime
from weightbus.producers.errors import PublisherClosed, SlotBusy, VersionNotNew
from weightbus.producers.publisher import Publisher, PublisherOptions, open_publisher
from weightbus.producers.shards import plan_part
from weightbus.producers.writers import SlotsIn
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.leases import ReaderLease
from weightbus.schemas.placement import SharedMemorySegment

pytestmark = pytest.mark.anyio

OPTIONS = PublisherOptions(slot_wait_s=0.0, close_wait_s=0.0)
MODEL = f"m{uuid.uuid4().hex[:12]}"


@pytest.fixture
def fake() -> FakeBus:
    return FakeBus()


@pytest.fixture
async def publisher(fake: FakeBus) -> AsyncIterator[Publisher]:
    async with open_publisher(fake.as_bus(), MODEL, options=OPTIONS) as publisher:
        yield publisher


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((8,), float(seed))}


def block_of(ready: CheckpointReady) -> str:
    (segment,) = (way for ways in ready.placement for way in ways)
    assert isinstance(segment, SharedMemorySegment)
    return segment.name


async def test_newest_version_is_the_last_that_was_announced(publisher: Publisher) -> None:
    assert await publisher.newest_version() == -1
    await publisher.publish(weights(1), 7)
    assert await publisher.newest_version() == 7


@pytest.mark.parametrize("step", ["put", "CheckpointReady"])
@pytest.mark.parametrize("failures", [1, 2, 3])
async def test_publisher_goes_on_when_a_version_is_tried_again(
    fake: FakeBus, publisher: Publisher, step: str, failures: int
) -> None:
    for _ in range(failures):
        fake.failing = {step}
        with pytest.raises(BusTimeout):
            await publisher.publish(weights(1), 1)
    blocks = [block_of(await publisher.publish(weights(n), n)) for n in (1, 2, 3, 4)]
    assert blocks[0] == blocks[2] != blocks[1] == blocks[3]
    assert [gone.version for gone in fake.said_of(CheckpointRetired)] == [1, 2]


async def test_newest_version_keeps_its_slot_when_the_bus_has_forgotten_it(
    fake: FakeBus, publisher: Publisher
) -> None:
    first = await publisher.publish(weights(1), 1)
    second = await publisher.publish(weights(2), 2)
    fake.forgetful = True
    fake.leases = [ReaderLease(model=MODEL, version=1, engine="a", consumer="c")]
    with pytest.raises(SlotBusy, match="a \\(version 1\\)"):
        await publisher.publish(weights(3), 3)
    fake.leases = []
    third = await publisher.publish(weights(3), 3)
    assert block_of(third) == block_of(first) != block_of(second)


async def test_version_is_refused_when_the_bus_has_forgotten_it(
    fake: FakeBus, publisher: Publisher
) -> None:
    await publisher.publish(weights(1), 3)
    fake.forgetful = True
    with pytest.raises(VersionNotNew, match="greater than 3, which trainer has used"):
        await publisher.publish(weights(1), 3)


async def test_readers_of_a_version_are_waited_for_when_it_may_have_been_said(
    fake: FakeBus, publisher: Publisher
) -> None:
    await publisher.publish(weights(1), 1)
    fake.failing = {"CheckpointReady"}
    with pytest.raises(BusTimeout):
        await publisher.publish(weights(2), 2)
    fake.leases = [ReaderLease(model=MODEL, version=2, engine="a", consumer="c")]
    with pytest.raises(SlotBusy, match="a \\(version 2\\)"):
        await publisher.publish(weights(3), 3)
    fake.leases = []
    await publisher.publish(weights(3), 3)


async def test_nothing_is_retired_when_a_version_was_certainly_not_said(
    fake: FakeBus, publisher: Publisher
) -> None:
    await publisher.publish(weights(1), 1)
    fake.failing = {"put"}
    with pytest.raises(BusTimeout):
        await publisher.publish(weights(2), 2)
    await publisher.publish(weights(3), 3)
    assert fake.said_of(CheckpointRetired) == []


def ready_of(version: int, producer: str) -> CheckpointReady:
    return CheckpointReady(model=MODEL, version=version, producer=producer, files=("/w",))


@pytest.mark.parametrize(("newest", "producer"), [(8, "another"), (7, "another"), (7, "trainer")])
async def test_version_is_refused_when_another_publisher_is_faster(
    fake: FakeBus, publisher: Publisher, newest: int, producer: str
) -> None:
    fake.faster = [ready_of(newest, producer)]
    with pytest.raises(VersionNotNew, match=f"is 7: .* {newest}, which {producer} has used"):
        await publisher.publish(weights(1), 7)
    assert [ready.producer for ready in fake.said_of(CheckpointReady)] == [producer]
    await publisher.publish(weights(1), 9)


async def test_version_is_said_when_an_older_one_comes_between(
    fake: FakeBus, publisher: Publisher
) -> None:
    fake.faster = [ready_of(6, "another")]
    ready = await publisher.publish(weights(1), 7)
    assert [said.version for said in fake.said_of(CheckpointReady)] == [6, 7]
    assert fake.said[-1] == ready


async def test_digests_of_a_dead_publisher_go_when_the_next_one_has_published_twice(
    fake: FakeBus, publisher: Publisher
) -> None:
    killed = [await publisher.publish(weights(version), version) for version in (1, 2)]
    foreign = ready_of(3, "another")
    fake.said.append(structs.replace(foreign, tensor_digests=await fake.put("f" * 64, b"")))
    async with open_publisher(fake.as_bus(), MODEL, options=OPTIONS) as following:
        fourth = await following.publish(weights(4), 4)
        assert set(fake.kept) == {killed[1].tensor_digests, fourth.tensor_digests, "f" * 64}
        fifth = await following.publish(weights(5), 5)
        assert set(fake.kept) == {fourth.tensor_digests, fifth.tensor_digests, "f" * 64}


async def test_leases_are_looked_at_ever_less_often_when_readers_stay(fake: FakeBus) -> None:
    options = PublisherOptions(slot_wait_s=1.0, close_wait_s=0.0)
    async with open_publisher(fake.as_bus(), MODEL, options=options) as publisher:
        for version in (1, 2):
            await publisher.publish(weights(version), version)
        fake.leases = [ReaderLease(model=MODEL, version=1, engine="a", consumer="c")]
        fake.looks = 0
        with pytest.raises(SlotBusy):
            await publisher.publish(weights(3), 3)
        assert fake.looks / 2 <= 9, "two versions are looked at, after 0, 20, 60, 140, 300 ... ms"
        fake.leases = []


def blocks() -> list[Path]:
    return list(Path("/dev/shm").glob(f"weightbus-{MODEL}.*"))


@pytest.mark.parametrize("slots", ["host", "device"])
async def test_slot_stays_to_its_writer_and_nothing_is_said_when_the_publisher_ends_before_it(
    fake: FakeBus, monkeypatch: pytest.MonkeyPatch, slots: SlotsIn
) -> None:
    monkeypatch.setattr(lifetime, "CLOSE_GRACE_S", 0.1)
    writing, go_on, devices = threading.Event(), threading.Event(), FakeDevices()
    options = structs.replace(OPTIONS, slots=slots, linger_s=0.0)
    errors: list[BaseException] = []

    def hold() -> None:
        writing.set()
        assert go_on.wait(30)

    async def publish(publisher: Publisher) -> None:
        part = plan_part(weights(2))
        try:
            await publisher.publish_part(part, 2, {}, publisher.hand_over(part, hold))
        except PublisherClosed as error:
            errors.append(error)

    async with anyio.create_task_group() as group:
        async with open_publisher(
            fake.as_bus(), MODEL, options=options, devices=devices
        ) as publisher:
            await publisher.publish(weights(1), 1)
            group.start_soon(publish, publisher)
            await anyio.to_thread.run_sync(writing.wait, 30)
        assert [retired.version for retired in fake.said_of(CheckpointRetired)] == [1]
        assert len(blocks()) == 1, "what is being written is left, what is not is removed"
        assert len(devices.cuda.allocated) == (slots == "device")
        go_on.set()
    assert len(errors) == 1
    assert [ready.version for ready in fake.said_of(CheckpointReady)] == [1]
    assert blocks() == []
    devices.cuda.assert_clean()


async def test_publication_is_cancelled_when_it_waits_for_readers_at_the_end(
    fake: FakeBus,
) -> None:
    options = structs.replace(OPTIONS, slot_wait_s=120.0)
    errors: list[BaseException] = []

    async def publish(publisher: Publisher) -> None:
        try:
            await publisher.publish(weights(3), 3)
        except PublisherClosed as error:
            errors.append(error)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            with suppress(KeyError):
                async with open_publisher(fake.as_bus(), MODEL, options=options) as publisher:
                    for version in (1, 2):
                        await publisher.publish(weights(version), version)
                    fake.leases = [ReaderLease(model=MODEL, version=1, engine="a", consumer="c")]
                    fake.looked = anyio.Event()
                    group.start_soon(publish, publisher)
                    await fake.looked.wait()
                    fake.leases = []
                    raise KeyError
    assert len(errors) == 1
    assert [ready.version for ready in fake.said_of(CheckpointReady)] == [1, 2]
    assert blocks() == []
