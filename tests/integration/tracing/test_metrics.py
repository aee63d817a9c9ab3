"""The figures of real updates, as Prometheus and a collector get them: they are what happened."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import torch
from msgspec import structs
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from tests.integration.fleet.fleet import Fleet
from tests.integration.fleet.log import DEADLINE_S
from tests.integration.fleet.processes import consume_command
from tests.integration.tracing.collector import Collector, free_port, open_collector
from tests.nats_server import NatsServer
from tests.unit.tracing.test_prometheus import scrape
from weightbus.consumers.engines.torch.client import open_torch_client
from weightbus.consumers.engines.torch.messages import Inputs
from weightbus.producers.blocking import BlockingPublisher
from weightbus.producers.publisher import PublisherOptions
from weightbus.schemas.progress import DeadLetter, FirstToken, StageComplete, UpdateComplete
from weightbus.schemas.rounds import Links, RoundComplete
from weightbus.tracing.otlp import OtlpSettings, PrometheusSettings
from weightbus.tracing.telemetry import Telemetry, open_telemetry

pytestmark = pytest.mark.anyio

PROMPT = Inputs(prompts=((1, 2, 3),), new_tokens=4)
POLL_S = 0.02
MEMORY_RATE = 10**9


class Readers:
    """Who reads the figures of this process's services: a Prometheus, and a collector."""

    def __init__(self, collector: Collector, stack: ExitStack) -> None:
        self.collector = collector
        self.port = free_port()
        self._stack = stack

    def service(self, name: str) -> Telemetry:
        settings = OtlpSettings(
            metrics_endpoint=f"{self.collector.url}/v1/metrics",
            prometheus=PrometheusSettings(host="127.0.0.1", port=self.port),
        )
        return self._stack.enter_context(open_telemetry(name, otlp=settings, shutdown_s=30))

    async def read(self, series: str, **labels: str) -> list[float]:
        """Values of a series, without its `weightbus_`, of those that have these labels."""
        found = await anyio.to_thread.run_sync(scrape, self.port)
        return [
            value
            for of, value in found.get(f"weightbus_{series}", [])
            if all(_label(of, name) == wanted for name, wanted in labels.items())
        ]

    async def until_positive(self, series: str, **labels: str) -> None:
        """Read until something was counted."""
        with anyio.move_on_after(DEADLINE_S):
            while True:
                if sum(await self.read(series, **labels)) > 0:
                    return
                await anyio.sleep(POLL_S)
        raise AssertionError(f"{series} {labels} stays at 0")

    async def until(self, wanted: list[float], series: str, **labels: str) -> None:
        """Read until it is so."""
        found: list[float] = []
        with anyio.move_on_after(DEADLINE_S):
            while True:
                found = await self.read(series, **labels)
                if found == wanted:
                    return
                await anyio.sleep(POLL_S)
        raise AssertionError(f"{series} {labels} is {found}, not {wanted}")

    async def sent(self) -> dict[str, dict[str, Metric]]:
        """What the collector has once every service has ended: service -> metric."""
        await anyio.to_thread.run_sync(self._stack.close)
        return self.collector.metrics


def _label(of: dict[str, str], name: str) -> str:
    return of.get(name if name in ("error_type", "service_name") else f"weightbus_{name}", "")


@pytest.fixture
def readers() -> Iterator[Readers]:
    with open_collector() as collector, ExitStack() as stack:
        yield Readers(collector, stack)


def points_of(metric: Metric) -> list[tuple[dict[str, str], Any]]:
    """Attributes, without their prefix, and points."""
    data = getattr(metric, str(metric.WhichOneof("data")))
    return [
        (
            {a.key.removeprefix("weightbus."): a.value.string_value for a in point.attributes},
            point,
        )
        for point in data.data_points
    ]


async def test_figures_are_those_of_the_updates_when_two_engines_follow(
    fleet: Fleet, readers: Readers
) -> None:
    older = fleet.next_version()
    links = Links(memory=MEMORY_RATE)
    async with (
        fleet.follow("a", telemetry=readers.service("a"), links=links) as a,
        fleet.follow("b", telemetry=readers.service("b")) as b,
        fleet.publisher(telemetry=readers.service("trainer")) as trainer,
    ):
        for _ in range(2):
            ready = await trainer.publish()
            for engine in (a, b):
                await engine.completes(ready.version)
                await engine.client.infer(PROMPT, DEADLINE_S)
                await fleet.log.wait(FirstToken, engine=engine.name, version=ready.version)
            await fleet.log.wait(RoundComplete, version=ready.version)
        await fleet.say(
            structs.replace(ready, version=older, producer="other", created_ns=ready.created_ns + 1)
        )
        for engine in (a, b):
            await engine.fails(older, "VersionNotNew")
            await readers.until([1.0], "update_failures_total", engine=engine.name)
            await readers.until([0.0], "rounds_active", engine=engine.name)
        await check_prometheus(fleet, readers, ready.version)
    check_collector(fleet, await readers.sent())


async def check_prometheus(fleet: Fleet, readers: Readers, version: int) -> None:
    for engine in ("a", "b"):
        updates = fleet.log.said(UpdateComplete, engine=engine)
        stages = fleet.log.said(StageComplete, engine=engine, stage="reload")
        tokens = fleet.log.said(FirstToken, engine=engine)
        of = {"engine": engine, "model": fleet.model}
        local = {**of, "route": "local"}
        ended = {**local, "outcome": "complete"}
        assert await readers.read("update_duration_seconds_count", **ended) == [2.0]
        assert await readers.read("update_duration_seconds_sum", **ended) == [
            pytest.approx(sum(seconds(update) for update in updates))
        ]
        assert await readers.read("update_size_bytes_sum", **local) == [
            sum(update.bytes for update in updates)
        ]
        assert await readers.read("stage_io_bytes_total", **local, stage="reload") == [
            sum(stage.bytes for stage in stages)
        ]
        assert await readers.read("engine_pause_duration_seconds_sum", **local) == [
            pytest.approx(sum(update.paused_s for update in updates))
        ]
        assert await readers.read("engine_first_token_duration_seconds_sum", **of) == [
            pytest.approx(sum(seconds(token) for token in tokens))
        ]
        for stage in ("negotiate", "reload", "commit"):
            assert await readers.read("stage_duration_seconds_count", **of, stage=stage) == [2.0]
        assert await readers.read("engine_version", **of) == [float(version)]
        assert await readers.read("engine_lag", **of) == [0.0]
        assert await readers.read("update_failures_total", **of, error_type="VersionNotNew") == [
            1.0
        ]
        rate = stages[-1].bytes / seconds(stages[-1])
        link = {**of, "stage": "reload", "link": "memory"}
        assert await readers.read("stage_throughput_bytes_per_second", **link) == [
            pytest.approx(rate)
        ]
        shares = [pytest.approx(rate / MEMORY_RATE)] if engine == "a" else []
        assert await readers.read("link_utilization", **link) == shares, "b's was not measured"
    assert await readers.read("versions_published_total", producer="trainer") == [2.0]
    assert await readers.read("telemetry_lost_total", signal="metrics") == [0.0] * 3


def seconds(timed: UpdateComplete | StageComplete | FirstToken) -> float:
    return (timed.end_ns - timed.start_ns) / 1e9


def check_collector(fleet: Fleet, sent: dict[str, dict[str, Metric]]) -> None:
    assert set(sent) == {"a", "b", "trainer"}
    for engine in ("a", "b"):
        updates = fleet.log.said(UpdateComplete, engine=engine)
        ((of, point),) = points_of(sent[engine]["weightbus.update.size"])
        assert of == {"model": fleet.model, "engine": engine, "route": "local"}
        assert (point.count, point.sum) == (2, sum(update.bytes for update in updates))
        ((of, point),) = points_of(sent[engine]["weightbus.update.failures"])
        assert (of["error.type"], point.as_int) == ("VersionNotNew", 1)
        assert sent[engine]["weightbus.update.duration"].unit == "s"
        assert sent[engine]["weightbus.stage.throughput"].unit == "By/s"
    ((_, point),) = points_of(sent["trainer"]["weightbus.versions.published"])
    assert point.as_int == 2


async def test_lag_rounds_and_waiting_slots_are_seen_while_an_engine_is_slow(
    fleet: Fleet, readers: Readers
) -> None:
    async with (
        fleet.follow("a", telemetry=readers.service("a")) as a,
        fleet.publisher(telemetry=readers.service("trainer")) as trainer,
        anyio.create_task_group() as tasks,
    ):
        for _ in range(2):
            first = (await trainer.publish()).version
            await a.completes(first)
        await readers.until([0.0], "rounds_active")
        held = a.engine.hold("before_apply")
        second = (await trainer.publish()).version
        await held.reached.wait()
        await readers.until([float(second - first)], "engine_lag", engine="a")
        assert await readers.read("engine_version", engine="a") == [float(first)]
        assert await readers.read("rounds_active", engine="a") == [1.0]
        assert await readers.read("slots_waiting") == [0.0]
        tasks.start_soon(trainer.publish)
        await readers.until([1.0], "slots_waiting", producer="trainer")
        held.release()
        await a.completes(second)
        await readers.until([0.0], "slots_waiting", producer="trainer")
        await readers.until([0.0], "engine_lag", engine="a")
        await readers.until([0.0], "rounds_active", engine="a")


async def test_dead_letters_are_counted_by_everyone_who_reports_them(
    fleet: Fleet, readers: Readers
) -> None:
    settings = structs.replace(fleet.settings, name="consumer-a")
    async with fleet.follow("a", telemetry=readers.service("a"), settings=settings) as a:
        subject = f"weightbus.{fleet.model}.checkpoint.ready"
        await fleet.bus.jetstream.publish(subject, b"{}", {"Content-Type": "application/json"})
        await fleet.log.wait(DeadLetter)
        await readers.until([1.0], "dead_letters_total", reporter="consumer-a")
        async with fleet.publisher() as trainer:
            await a.completes((await trainer.publish()).version)


async def test_prometheus_reads_a_command_when_the_standard_variables_say_so(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus")
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_HOST", "127.0.0.1")
    monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_PORT", str(port))
    directory = tmp_path / "engine"
    directory.mkdir(mode=0o700)
    async with (
        fleet.publisher() as trainer,
        open_torch_client(directory) as client,
        fleet.watched(client),
        consume_command(fleet, "own", directory),
    ):
        version = (await trainer.publish()).version
        await fleet.completes("own", client, version)
        found = await anyio.to_thread.run_sync(scrape, port)
    ((of, value),) = found["weightbus_engine_version"]
    assert (of["weightbus_engine"], of["service_name"]) == ("own", "weightbus-consumer")
    assert value == version
    assert [info["weightbus_engine"] for info, _ in found["target_info"]] == ["own"]


async def test_exports_that_a_collector_refuses_are_counted_where_prometheus_reads(
    fleet: Fleet, readers: Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers.collector.status = 400
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
    settings = OtlpSettings(
        endpoint=f"{readers.collector.url}/v1/traces",
        metrics_endpoint=f"{readers.collector.url}/v1/metrics",
        prometheus=PrometheusSettings(host="127.0.0.1", port=readers.port),
    )
    with open_telemetry("a", otlp=settings) as telemetry:
        async with fleet.follow("a", telemetry=telemetry) as a, fleet.publisher() as trainer:
            for _ in range(2):
                version = (await trainer.publish()).version
                await a.completes(version)
            await readers.until_positive("telemetry_lost_total", signal="metrics")
            await readers.until_positive("telemetry_lost_total", signal="spans", cause="refused")
            assert await readers.read("telemetry_lost_total", cause="queue_full") == [0.0]
            assert await readers.read("engine_version") == [float(version)]
            assert telemetry.losses.metrics_refused > 0
    assert readers.collector.metrics == {}


def test_consumer_warns_once_and_goes_on_when_the_port_is_taken() -> None:
    command = ["weightbus", "consume", "--model", "m", "--engine-id", "e"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        environment = os.environ | {
            "OTEL_METRICS_EXPORTER": "prometheus",
            "OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1",
            "OTEL_EXPORTER_PROMETHEUS_PORT": str(port),
        }
        with subprocess.Popen(
            [sys.executable, "-m", *command, "--architecture", "decoder"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as consumer:
            assert consumer.stdout is not None
            printed = []
            for line in consumer.stdout:
                printed.append(line)
                if "follows m" in line:
                    break
            consumer.terminate()
            _, errors = consumer.communicate(timeout=120)
    assert any("follows m" in line for line in printed), (printed, errors)
    assert not any("Prometheus reads" in line for line in printed), printed
    assert consumer.returncode == 0, errors
    told = f"metrics cannot be read at http://127.0.0.1:{port}/metrics: Address already in"
    assert errors.count(told) == 1, errors


def test_trainers_of_one_process_are_read_at_one_address(shared_server: NatsServer) -> None:
    port = free_port()
    otlp = OtlpSettings(prometheus=PrometheusSettings(host="127.0.0.1", port=port))
    weights = {"w": torch.ones(3)}
    with ExitStack() as stack:
        trainers = [
            stack.enter_context(
                BlockingPublisher(
                    shared_server.settings,
                    f"m{uuid.uuid4().hex[:12]}",
                    producer=f"t{number}",
                    otlp=otlp,
                    options=PublisherOptions(linger_s=0.0),
                )
            )
            for number in range(2)
        ]
        for count, trainer in enumerate(trainers, start=1):
            for version in range(1, count + 1):
                trainer.publish(weights, version)
        found = scrape(port)["weightbus_versions_published_total"]
    assert {of["service_name"]: value for of, value in found} == {"t0": 1.0, "t1": 2.0}
