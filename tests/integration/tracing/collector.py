"""OTLP collectors for tests: one that keeps what it gets, and ones that misbehave."""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span

__all__ = (
    "Collector",
    "free_port",
    "hanging_collector",
    "open_collector",
    "open_grpc_collector",
)

GRPC_SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"


class Collector:
    """What arrived, by service name."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.status = 200
        self.spans: dict[str, list[Span]] = {}
        self.metrics: dict[str, dict[str, Metric]] = {}
        """By service name and their own; the last that was said."""
        self.headers: list[dict[str, str]] = []

    def take(self, request: ExportTraceServiceRequest) -> None:
        for group in request.resource_spans:
            service = {item.key: item.value.string_value for item in group.resource.attributes}
            for scope in group.scope_spans:
                self.spans.setdefault(service["service.name"], []).extend(scope.spans)

    def take_metrics(self, request: ExportMetricsServiceRequest) -> None:
        for group in request.resource_metrics:
            service = {item.key: item.value.string_value for item in group.resource.attributes}
            for scope in group.scope_metrics:
                last = self.metrics.setdefault(service["service.name"], {})
                last.update({metric.name: metric for metric in scope.metrics})


@contextmanager
def open_collector() -> Iterator[Collector]:
    """A real HTTP server on loopback that decodes what is posted to `/v1/traces` and
    `/v1/metrics`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            collector.headers.append({name.lower(): text for name, text in self.headers.items()})
            if self.path == "/v1/traces" and collector.status == 200:
                collector.take(ExportTraceServiceRequest.FromString(body))  # type: ignore[no-untyped-call]
            if self.path == "/v1/metrics" and collector.status == 200:
                collector.take_metrics(ExportMetricsServiceRequest.FromString(body))  # type: ignore[no-untyped-call]
            answer = ExportTraceServiceResponse().SerializeToString()  # type: ignore[no-untyped-call]
            self.send_response(collector.status)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def open_grpc_collector() -> Iterator[Collector]:
    """A real gRPC server on loopback that keeps the spans that are exported to it."""
    grpc = pytest.importorskip("grpc", reason="the gRPC exporter is not installed")

    def export(request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
        collector.headers.append({key: str(value) for key, value in context.invocation_metadata()})
        collector.take(request)
        return ExportTraceServiceResponse()

    method = grpc.unary_unary_rpc_method_handler(
        export,
        request_deserializer=ExportTraceServiceRequest.FromString,
        response_serializer=ExportTraceServiceResponse.SerializeToString,
    )
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(GRPC_SERVICE, {"Export": method}),)
    )
    collector = Collector(f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    server.start()
    yield collector
    server.stop(grace=None).wait(30)


@contextmanager
def hanging_collector() -> Iterator[str]:
    """URL of a port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
