"""A collector that is absent, stops, hangs, refuses or answers nonsense costs spans, and no more.

With real updates under way: a trainer and a consumer that export to it, and an engine that holds
what was published, bit by bit. Every span that was made is at the collector, or counted as lost.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

from tests.integration.fleet.fleet import Fleet
from tests.integration.tracing.collector import free_port
from tests.integration.tracing.faulty import FAULTS, Fault, Faulty, open_faulty
from weightbus.schemas.progress import UpdateFailed
from weightbus.tracing.otlp import OtlpProtocol, OtlpSettings
from weightbus.tracing.telemetry import Telemetry, open_telemetry

pytestmark = [pytest.mark.anyio, pytest.mark.faults]

PROTOCOLS: tuple[OtlpProtocol, ...] = ("http/protobuf", "grpc")
SHUTDOWN_S = 0.5
SLACK_S = 5.0
"""Of a slow machine, for two services to end."""
ASKED_S = 30.0


class Counter(SpanProcessor):
    """Spans that have ended, whatever becomes of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.ended = 0

    def on_end(self, span: ReadableSpan) -> None:
        with self._lock:
            self.ended += 1


@dataclass
class Services:
    trainer: Telemetry
    consumer: Telemetry
    counters: list[Counter] = field(default_factory=list)

    @property
    def made(self) -> int:
        return sum(counter.ended for counter in self.counters)

    @property
    def lost(self) -> int:
        return self.trainer.losses.total + self.consumer.losses.total


def settings_of(url: str, protocol: OtlpProtocol) -> OtlpSettings:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
    settings = OtlpSettings.from_env(environ)
    assert settings is not None
    return settings


@contextmanager
def open_services(
    url: str, protocol: OtlpProtocol, logged: pytest.LogCaptureFixture
) -> Iterator[Services]:
    """A trainer's and a consumer's telemetry; sees to it that they end in time, and say little."""
    otlp = settings_of(url, protocol)
    with ExitStack() as stack:
        trainer, consumer = (
            stack.enter_context(open_telemetry(name, otlp=otlp, shutdown_s=SHUTDOWN_S))
            for name in ("trainer", "consumer")
        )
        services = Services(trainer, consumer)
        for telemetry in (trainer, consumer):
            counter = Counter()
            telemetry._tracer.span_processor.add_span_processor(counter)  # type: ignore[union-attr]
            services.counters.append(counter)
        yield services
        began = time.monotonic()
    assert time.monotonic() - began < 2 * SHUTDOWN_S + SLACK_S
    said = [record.getMessage() for record in logged.records if record.levelno >= logging.WARNING]
    for name, telemetry in (("consumer", consumer), ("trainer", trainer)):
        lost = telemetry.losses.total
        told = [text for text in said if re.search(rf" spans? of {name} w\w+ lost", text)]
        assert [int(text.partition(" ")[0]) for text in told] == [lost] * bool(lost), said
        of_metrics = [text for text in said if f" of metrics of {name} w" in text]
        assert len(of_metrics) <= 1, said
        said = [text for text in said if text not in (*told, *of_metrics)]
    assert said == [], "a log is flooded"


async def run_updates(
    fleet: Fleet, services: Services, fault: Fault = "", at: Faulty | None = None
) -> None:
    """Two versions, that the engine holds bit by bit. `at` gets its fault between them."""
    async with (
        fleet.follow("a", telemetry=services.consumer) as a,
        fleet.publisher(telemetry=services.trainer) as trainer,
    ):
        await a.completes((await trainer.publish()).version)
        if at is not None:
            await anyio.to_thread.run_sync(at.asked.wait, ASKED_S)
            at.fault = fault
        await a.completes((await trainer.publish()).version)
    assert fleet.log.said(UpdateFailed) == []
    assert services.made > 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_every_span_arrives_when_the_collector_is_well(
    fleet: Fleet, protocol: OtlpProtocol, caplog: pytest.LogCaptureFixture
) -> None:
    with open_faulty(protocol) as collector:
        with open_services(collector.url, protocol, caplog) as services:
            await run_updates(fleet, services)
            await anyio.to_thread.run_sync(collector.asked.wait, ASKED_S)
        assert (collector.delivered + services.lost, services.lost) == (services.made, 0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_updates_complete_and_losses_are_counted_when_no_collector_is_there(
    fleet: Fleet, protocol: OtlpProtocol, caplog: pytest.LogCaptureFixture
) -> None:
    with open_services(f"http://127.0.0.1:{free_port()}", protocol, caplog) as services:
        await run_updates(fleet, services)
    assert services.lost == services.made


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_updates_complete_and_losses_are_counted_when_the_collector_stops(
    fleet: Fleet, protocol: OtlpProtocol, caplog: pytest.LogCaptureFixture
) -> None:
    with open_faulty(protocol) as collector:
        with open_services(collector.url, protocol, caplog) as services:
            await run_updates(fleet, services, at=collector)
            await anyio.to_thread.run_sync(collector.stop)
            await run_updates(fleet, services)
        assert 0 < collector.delivered < services.made
        assert collector.delivered + services.lost == services.made


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("fault", FAULTS)
async def test_updates_complete_and_losses_are_counted_when_the_collector_fails(
    fleet: Fleet, protocol: OtlpProtocol, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    with open_faulty(protocol) as collector:
        with open_services(collector.url, protocol, caplog) as services:
            await run_updates(fleet, services, fault, collector)
        assert 0 < collector.delivered < services.made
        assert collector.delivered + services.lost == services.made, services.consumer.losses
