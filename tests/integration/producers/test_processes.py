"""Trainers in processes of their own, with blocking publishers: ranks, ends and kills."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.integration.producers.reader import blocks_of, next_message, read_checkpoint
from tests.integration.producers.trainer import whole
from tests.integration.tracing.collector import open_collector
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus
from weightbus.bus.errors import BusUnavailable
from weightbus.bus.settings import BusSettings
from weightbus.producers.blocking import BlockingPublisher
from weightbus.producers.errors import PublisherClosed, TensorInvalid, VersionNotNew
from weightbus.producers.publisher import open_publisher
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.leases import ReaderLease
from weightbus.tracing.otlp import OtlpSettings


class Trainer:
    """One rank's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def tell(self, version: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"version": version}) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, object]:
        assert self.process.stdout is not None
        heard: dict[str, object] = json.loads(self.process.stdout.readline())
        return heard

    def publish(self, version: int) -> dict[str, object]:
        self.tell(version)
        return self.hear()

    def end(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(60)


@contextmanager
def running_trainer(
    server: NatsServer, model: str, rank: int = 0, world_size: int = 1, end: str = "close"
) -> Iterator[Trainer]:
    module = "tests.integration.producers.trainer"
    arguments = [server.url, model, str(rank), str(world_size), end]
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parents[3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Trainer(process)
        finally:
            process.kill()


def blocks_in_shm(model: str) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"weightbus-{model}.*")]


@pytest.mark.anyio
async def test_processes_make_one_checkpoint_when_each_holds_rows(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    with (
        running_trainer(nats_server, model, 0, 3) as first,
        running_trainer(nats_server, model, 1, 3) as second,
        running_trainer(nats_server, model, 2, 3) as third,
    ):
        trainers = (first, second, third)
        assert [trainer.hear() for trainer in trainers] == [{"open": True}] * 3
        for version in (1, 2, 3):
            for trainer in trainers:
                trainer.tell(version)
            assert [trainer.hear() for trainer in trainers] == [{"published": version}] * 3
            last = await bus.last(CheckpointReady, model=model)
            assert last is not None
            assert len(last.message.placement) == 3
            found = await read_checkpoint(bus, last.message)
            assert torch.equal(found["w"], whole(version))
        assert [trainer.end() for trainer in trainers] == [0, 0, 0]


@pytest.mark.anyio
async def test_blocks_of_a_killed_trainer_go_when_the_next_one_starts(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    with running_trainer(nats_server, model) as trainer:
        assert trainer.hear() == {"open": True}
        assert trainer.publish(1) == {"published": 1}
        assert trainer.publish(2) == {"published": 2}
        last = await bus.last(CheckpointReady, model=model)
        assert last is not None
        trainer.process.kill()
        trainer.process.wait()
    assert len(blocks_in_shm(model)) == 2
    found = await read_checkpoint(bus, last.message)
    assert torch.equal(found["w"], whole(2)), "what a dead trainer has published is still whole"
    (block,) = blocks_of(last.message)
    async with open_publisher(bus, model) as publisher:
        assert blocks_in_shm(model) == []
        assert block.is_whole, "who has it mapped keeps it"
        retired = await bus.last(CheckpointRetired, model=model)
        assert retired is not None
        assert (retired.message.version, retired.message.reason) == (2, "its publisher died")
        with pytest.raises(VersionNotNew):
            await publisher.publish({"w": whole(2)}, 2)
        await publisher.publish({"w": whole(3)}, 3)


@pytest.mark.anyio
@pytest.mark.parametrize(("end", "code"), [("close", 0), ("exit", 0), ("raise", 1)])
async def test_nothing_is_left_when_a_trainer_ends(
    nats_server: NatsServer, bus: Bus, model: str, end: str, code: int
) -> None:
    with running_trainer(nats_server, model, end=end) as trainer:
        assert trainer.hear() == {"open": True}
        assert trainer.publish(1) == {"published": 1}
        assert len(blocks_in_shm(model)) == 1
        assert trainer.end() == code
    assert blocks_in_shm(model) == []
    retired = await bus.last(CheckpointRetired, model=model)
    assert retired is not None
    assert retired.message.version == 1


@pytest.mark.anyio
async def test_nothing_is_left_when_a_trainer_is_interrupted_while_it_waits_for_a_reader(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    with running_trainer(nats_server, model) as trainer:
        assert trainer.hear() == {"open": True}
        for version in (1, 2):
            assert trainer.publish(version) == {"published": version}
        lease = ReaderLease(model=model, version=1, engine="slow", consumer="c")
        await bus.reader_leases.take(lease, 60)
        async with bus.subscribe(CheckpointRetired, model=model) as messages:
            trainer.tell(3)
            assert (await next_message(messages)).message.version == 1
        trainer.process.send_signal(signal.SIGINT)
        assert trainer.process.wait(60) == -signal.SIGINT
    assert blocks_in_shm(model) == []
    retired = await bus.last(CheckpointRetired, model=model)
    assert retired is not None
    assert (retired.message.version, retired.message.active_readers) == (2, 1)


def test_blocking_publisher_works_from_any_thread_and_ends_with_its_block(
    nats_server: NatsServer, model: str
) -> None:
    versions = []
    with BlockingPublisher(nats_server.settings, model) as publisher:
        assert publisher.url == nats_server.url

        def publish() -> None:
            versions.append(publisher.publish({"w": torch.ones(3)}, 1).version)

        thread = threading.Thread(target=publish)
        thread.start()
        thread.join()
        versions.append(publisher.publish({"w": torch.zeros(3)}, 2).version)
        with pytest.raises(TensorInvalid):
            publisher.publish({"w": torch.zeros(3, device="meta")}, 3)
    assert versions == [1, 2]
    with pytest.raises(PublisherClosed):
        publisher.publish({"w": torch.zeros(3)}, 3)
    publisher.close()


def test_blocking_publisher_sends_spans_and_metrics_when_a_collector_is_given(
    nats_server: NatsServer, model: str
) -> None:
    with open_collector() as collector:
        otlp = OtlpSettings(
            endpoint=f"{collector.url}/v1/traces", metrics_endpoint=f"{collector.url}/v1/metrics"
        )
        with BlockingPublisher(nats_server.settings, model, producer="t", otlp=otlp) as publisher:
            publisher.publish({"w": torch.ones(3)}, 1)
        (published,) = collector.spans["t"]
        (blocked,) = collector.metrics["t"]["weightbus.publish.blocked"].histogram.data_points
    assert blocked.count == 1
    assert published.parent_span_id == b""
    assert published.name.startswith("publish")


def test_blocking_publisher_leaves_no_thread_when_it_cannot_be_opened(model: str) -> None:
    before = threading.active_count()
    settings = BusSettings(url="nats://127.0.0.1:9", connect_timeout_s=0.2)
    with pytest.raises(BusUnavailable):
        BlockingPublisher(settings, model)
    assert threading.active_count() <= before
