"""Spans arrive over gRPC too."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.integration.tracing.collector import Collector, free_port
from weightbus.tracing.otlp import OtlpSettings
from weightbus.tracing.telemetry import open_telemetry

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A real gRPC server on loopback that keeps what is exported to it."""
    grpc = pytest.importorskip("grpc", reason="the gRPC exporter is not installed")

    def export(request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
        kept.headers.append({key: str(value) for key, value in context.invocation_metadata()})
        kept.take(request)
        return ExportTraceServiceResponse()

    method = grpc.unary_unary_rpc_method_handler(
        export,
        request_deserializer=ExportTraceServiceRequest.FromString,
        response_serializer=ExportTraceServiceResponse.SerializeToString,
    )
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {"Export": method}),)
    )
    kept = Collector(f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    server.start()
    yield kept
    server.stop(grace=None).wait(30)


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
    assert "1 spans of trainer were lost" in caplog.text
