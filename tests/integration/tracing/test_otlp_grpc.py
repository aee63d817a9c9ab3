"""Spans arrive over gRPC too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.tracing.collector import Collector, free_port, open_grpc_collector
from weightbus.tracing.otlp import OtlpSettings
from weightbus.tracing.telemetry import open_telemetry


@pytest.fixture
def collector() -> Iterator[Collector]:
    with open_grpc_collector() as collector:
        yield collector


def test_collector_has_the_span_when_it_is_exported_over_grpc(collector: Collector) -> None:
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_HEADERS": "Tenant=a",
    }
    settings = OtlpSettings.from_env(environ)
    with (
        open_telemetry("trainer", otlp=settings, shutdown_s=30) as telemetry,
        telemetry.span("publish") as span,
    ):
        pass
    (arrived,) = collector.spans["trainer"]
    assert arrived.span_id.hex() == span.ref.span_id
    assert collector.headers[0]["tenant"] == "a"


def test_shutdown_is_bounded_when_no_grpc_collector_is_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("grpc", reason="the gRPC exporter is not installed")
    settings = OtlpSettings(endpoint=f"http://127.0.0.1:{free_port()}", protocol="grpc")
    with (
        open_telemetry("trainer", otlp=settings, shutdown_s=0.2) as telemetry,
        telemetry.span("publish"),
    ):
        pass
    assert "1 span of trainer was lost" in caplog.text
