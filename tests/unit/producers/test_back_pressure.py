"""Engines that are slower than the trainer: it waits, skips or fails; all is said and counted."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import pytest
import torch
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.unit.producers.fake_devices import FakeDevices
from tests.unit.producers.fakes import FakeBus
from tests.unit.tracing.test_metrics import points_of
from weightbus.bus.errors import BusTimeout, FileUnreadable, SettingInvalid
from weightbus.producers.errors import PublisherClosed, SlotBusy, VersionNotNew, VersionSkipped
from weightbus.producers.publisher import Publisher, PublisherOptions, open_publisher
from weightbus.producers.shards import plan_part
from weightbus.producers.slots import WhenBusy
from weightbus.producers.writers import SlotsIn
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired, CheckpointSkipped
from weightbus.schemas.leases import ReaderLease
from weightbus.tracing.telemetry import Telemetry, open_telemetry

pytestmark = pytest.mark.anyio

MODEL = "back-pressure"
SLOT_BYTES = 8 * 4


@pytest.fixture
def fake() -> FakeBus:
    return FakeBus()


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((8,), float(seed))}


def lease(version: int, age_s: float = 0.0) -> ReaderLease:
    taken_ns = time.time_ns() - int(age_s * 1e9)
    return ReaderLease(model=MODEL, version=version, engine="slow", consumer="c", taken_ns=taken_ns)


@asynccontextmanager
async def open_full(
    fake: FakeBus,
    when_busy: WhenBusy,
    wait_s: float = 0.0,
    telemetry: Telemetry | None = None,
) -> AsyncIterator[Publisher]:
    """Versions 1 and 2 are in the slots."""
    options = PublisherOptions(when_busy=when_busy, slot_wait_s=wait_s, close_wait_s=0.0)
    async with open_publisher(
        fake.as_bus(), MODEL, options=options, telemetry=telemetry
    ) as publisher:
        for version in (1, 2):
            await publisher.publish(weights(version), version)
        yield publisher


def versions(fake: FakeBus) -> list[int]:
    return [ready.version for ready in fake.said_of(CheckpointReady)]


async def test_options_are_refused_when_the_policy_is_unknown(fake: FakeBus) -> None:
    options = PublisherOptions(when_busy="hurry")  # type: ignore[arg-type]
    with pytest.raises(SettingInvalid, match="when_busy is 'hurry': must be one of wait, skip, fa"):
        async with open_publisher(fake.as_bus(), MODEL, options=options):
            pass


@pytest.mark.parametrize("read", [1, 2])
async def test_version_is_skipped_at_once_and_nothing_is_retired_when_engines_are_busy(
    fake: FakeBus, read: int
) -> None:
    async with open_full(fake, "skip", wait_s=60) as publisher:
        fake.leases = [lease(read)]
        with anyio.fail_after(5), pytest.raises(VersionSkipped) as caught:
            await publisher.publish(weights(3), 3)
        assert str(caught.value) == f"version 3 is skipped: still read by slow (version {read})"
        assert fake.said_of(CheckpointRetired) == [], "who is cut short may still take version 1"
        (said,) = fake.said_of(CheckpointSkipped)
        assert (said.version, said.producer, said.cause) == (3, "trainer", "busy")
        assert f"slow (version {read})" in said.reason
        fake.leases = []
        await publisher.publish(weights(4), 4)
    assert versions(fake) == [1, 2, 4]


async def test_version_is_skipped_when_an_engine_begins_to_read_before_it_hears_the_retirement(
    fake: FakeBus,
) -> None:
    async with open_full(fake, "skip", wait_s=60) as publisher:
        fake.on_publish = lambda message: (
            fake.leases.append(lease(1)) if isinstance(message, CheckpointRetired) else None
        )
        with anyio.fail_after(5), pytest.raises(VersionSkipped):
            await publisher.publish(weights(3), 3)
        fake.leases = []
    assert versions(fake) == [1, 2]


async def test_version_fails_at_once_when_engines_are_busy(fake: FakeBus) -> None:
    async with open_full(fake, "fail", wait_s=60) as publisher:
        fake.leases = [lease(1)]
        with anyio.fail_after(5), pytest.raises(SlotBusy, match=r"after 0 s .* slow"):
            await publisher.publish(weights(3), 3)
        assert fake.said_of(CheckpointRetired) == []
        (said,) = fake.said_of(CheckpointSkipped)
        assert (said.version, said.cause, said.waited_s) == (3, "busy", 0.0)
        fake.leases = []
        await publisher.publish(weights(3), 3)
    assert versions(fake) == [1, 2, 3]


async def test_wait_is_warned_about_once_with_numbers_and_its_end_is_an_event(
    fake: FakeBus, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_full(fake, "wait", wait_s=1.9) as publisher:
        fake.leases = [lease(1, age_s=7.0), lease(2)]
        with pytest.raises(SlotBusy):
            await publisher.publish(weights(3), 3)
        fake.leases = []
    (said,) = fake.said_of(CheckpointSkipped)
    assert (said.version, said.cause) == (3, "busy")
    assert 1.9 <= said.waited_s < 10
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert re.search(r"version 3 of back-pressure has waited 1\.[0-9] s", warning), warning
    assert "of 1.9 s at most" in warning
    age = re.search(r"slow \(version 1\) for ([0-9.]+) s", warning)
    assert age is not None, warning
    assert 8.0 <= float(age[1]) < 20
    assert "slow (version 2) for " in warning
    assert f"the two slots take {2 * size_of_slot():,} host bytes" in warning


def size_of_slot() -> int:
    size_bytes: int = plan_part(weights(1)).layout.segments[0].size_bytes
    return size_bytes


async def test_nobody_is_warned_when_the_wait_is_short(
    fake: FakeBus, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_full(fake, "wait", wait_s=30) as publisher, anyio.create_task_group() as tasks:
        fake.leases = [lease(1)]
        fake.looked = anyio.Event()
        tasks.start_soon(publisher.publish, weights(3), 3)
        await fake.looked.wait()
        fake.leases = []
    assert versions(fake) == [1, 2, 3]
    assert fake.said_of(CheckpointSkipped) == []
    assert caplog.records == []


async def test_slot_is_counted_as_waiting_while_engines_read_it(fake: FakeBus) -> None:
    reader = InMemoryMetricReader()
    with open_telemetry("t", reader=reader) as telemetry:
        async with (
            open_full(fake, "wait", wait_s=30, telemetry=telemetry) as publisher,
            anyio.create_task_group() as tasks,
        ):
            before = points_of(reader)["weightbus.slots.waiting {slot}"]
            fake.leases = [lease(1)]
            fake.looked = anyio.Event()
            tasks.start_soon(publisher.publish, weights(3), 3)
            await fake.looked.wait()
            during = points_of(reader)["weightbus.slots.waiting {slot}"]
            fake.leases = []
        after = points_of(reader)["weightbus.slots.waiting {slot}"]
    assert [point.value for (point,) in (before, during, after)] == [0, 1, 0]


@pytest.mark.parametrize("policy", ["wait", "skip", "fail"])
async def test_figures_are_on_the_span_and_in_the_metrics(fake: FakeBus, policy: WhenBusy) -> None:
    reader, exporter = InMemoryMetricReader(), InMemorySpanExporter()
    with open_telemetry("t", exporter=exporter, reader=reader, shutdown_s=30) as telemetry:
        async with open_full(fake, policy, wait_s=0.3, telemetry=telemetry) as publisher:
            fake.leases = [lease(1)]
            with pytest.raises((SlotBusy, VersionSkipped)):
                await publisher.publish(weights(3), 3)
            fake.leases = []
            points = points_of(reader)
        gone = points_of(reader)
    waited_s = 0.3 if policy == "wait" else 0.0
    (blocked,) = points["weightbus.publish.blocked s"]
    assert blocked.count == 3
    assert waited_s <= blocked.sum < 20
    (waited,) = points["weightbus.publish.waited s"]
    assert waited.count == 3
    assert waited_s <= waited.sum <= blocked.sum
    assert [p.value for p in points["weightbus.slots.waiting {slot}"]] == [0]
    assert [p.value for p in points["weightbus.versions.published {version}"]] == [2]
    (skipped,) = points["weightbus.versions.skipped {version}"]
    assert (skipped.value, skipped.attributes["weightbus.cause"]) == (1, "busy")
    (slots,) = points["weightbus.slot.size By"]
    assert (slots.value, slots.attributes["weightbus.memory"]) == (2 * size_of_slot(), "host")
    assert [p.value for p in gone["weightbus.slot.size By"]] == [0]
    first, second, third = [dict(span.attributes or {}) for span in exporter.get_finished_spans()]
    sizes = [each["weightbus.slot_bytes"] for each in (first, second, third)]
    assert sizes == [size_of_slot(), 2 * size_of_slot(), 2 * size_of_slot()]
    assert first["weightbus.waited_s"] == 0.0
    assert waited_s <= float(str(third["weightbus.waited_s"])) < 10
    assert float(str(third["weightbus.blocked_s"])) >= waited_s


@pytest.mark.parametrize("slots", ["host", "device"])
async def test_trainer_is_blocked_until_its_tensors_are_copied_and_no_longer(
    fake: FakeBus, slots: SlotsIn
) -> None:
    exporter = InMemorySpanExporter()
    options = PublisherOptions(slots=slots, close_wait_s=0.0, linger_s=0.0)
    with open_telemetry("t", exporter=exporter, shutdown_s=30) as telemetry:
        async with open_publisher(
            fake.as_bus(), MODEL, options=options, telemetry=telemetry, devices=FakeDevices()
        ) as publisher:
            part = plan_part(weights(1))
            waiting = publisher.hand_over(part)
            await anyio.sleep(0.2)
            await publisher.publish_part(part, 1, {}, waiting)
            copied = anyio.Event()
            gone_on = publisher.hand_over(part, lambda: anyio.from_thread.run_sync(copied.set))
            fake.slow_put_s = 2.0
            await publisher.publish_part(part, 2, {}, gone_on)
            assert copied.is_set()
    blocked = [dict(span.attributes or {}) for span in exporter.get_finished_spans()]
    assert float(str(blocked[0]["weightbus.blocked_s"])) >= 0.2, "from when it is handed over"
    assert float(str(blocked[1]["weightbus.blocked_s"])) < 2.0, "what comes after costs it nothing"


async def test_version_is_said_to_have_failed_when_it_cannot_be_announced(fake: FakeBus) -> None:
    async with open_full(fake, "wait") as publisher:
        fake.failing = {"put"}
        with pytest.raises(BusTimeout):
            await publisher.publish(weights(3), 3)
        (said,) = fake.said_of(CheckpointSkipped)
        assert (said.version, said.cause, said.reason[:11]) == (3, "failed", "BusTimeout:")


async def test_nothing_is_said_when_readers_may_know_of_the_version(fake: FakeBus) -> None:
    async with open_full(fake, "wait") as publisher:
        fake.failing = {"CheckpointReady"}
        with pytest.raises(BusTimeout):
            await publisher.publish(weights(3), 3)
        with pytest.raises(VersionNotNew):
            await publisher.publish(weights(2), 2)
    assert fake.said_of(CheckpointSkipped) == []


async def test_first_error_is_raised_when_that_of_the_version_cannot_be_said(
    fake: FakeBus, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_full(fake, "skip") as publisher:
        fake.leases = [lease(2)]
        fake.failing = {"CheckpointSkipped"}
        with pytest.raises(VersionSkipped):
            await publisher.publish(weights(3), 3)
        fake.leases = []
    assert "that version 3 is skipped was not said" in caplog.text


async def test_version_is_said_to_have_failed_when_its_files_are_missing(fake: FakeBus) -> None:
    async with open_full(fake, "wait") as publisher:
        with pytest.raises(FileUnreadable):
            await publisher.publish_files(["/nowhere/w.safetensors"], 3)
    (said,) = fake.said_of(CheckpointSkipped)
    assert (said.version, said.cause) == (3, "failed")


async def test_version_is_said_to_have_failed_when_the_publisher_ends_before_it(
    fake: FakeBus,
) -> None:
    errors = list[BaseException]()

    async def publish(publisher: Publisher) -> None:
        try:
            await publisher.publish(weights(3), 3)
        except PublisherClosed as error:
            errors.append(error)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            with suppress(KeyError):
                async with open_full(fake, "wait", wait_s=120) as publisher:
                    fake.leases = [lease(1)]
                    fake.looked = anyio.Event()
                    tasks.start_soon(publish, publisher)
                    await fake.looked.wait()
                    fake.leases = []
                    raise KeyError
    assert len(errors) == 1
    (said,) = fake.said_of(CheckpointSkipped)
    assert (said.version, said.cause, said.reason) == (3, "failed", "its publisher has ended")


@pytest.fixture(autouse=True)
def no_blocks_left() -> Iterator[None]:
    yield
    assert list(Path("/dev/shm").glob(f"weightbus-{MODEL}.*")) == []
