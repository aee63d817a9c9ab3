"""OTLP collectors that fail in one way or another, over HTTP and over gRPC, and can be stopped."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from typing import Any, Final, Literal

from tests.integration.tracing.collector import Collector

__all__ = ("FAULTS", "Fault", "Faulty", "open_faulty")

grpc: Any = import_module("grpc")  # it, and what protobuf generates, have no types
traces: Any = import_module("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
metrics: Any = import_module("opentelemetry.proto.collector.metrics.v1.metrics_service_pb2")

Fault = Literal["", "refuses", "refuses_for_good", "hangs", "garbage", "rejects"]
"""`refuses`: try again later; `refuses_for_good`: not authorised; `garbage`: what it answers is not
of the protocol; `rejects`: it takes the request, and says that it has thrown its spans away."""

FAULTS: Final[tuple[Fault, ...]] = ("refuses", "refuses_for_good", "hangs", "garbage", "rejects")

GARBAGE: Final = b"<html>It works!</html>"
STATUS: Final = {"refuses": 503, "refuses_for_good": 401}
CODE: Final = {
    "refuses": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "refuses_for_good": grpc.StatusCode.UNAUTHENTICATED,
}
SERVICES: Final = "opentelemetry.proto.collector"


class Faulty(Collector):
    """Keeps what it gets while it has no fault."""

    def __init__(self, url: str, stop: Callable[[], None]) -> None:
        super().__init__(url)
        self.fault: Fault = ""
        self.asked = threading.Event()
        """Something was sent to it."""
        self.released = threading.Event()
        """At the end: what hangs is let go."""
        self.stop = stop
        """Nobody listens at its port any more. Idempotent."""

    @property
    def delivered(self) -> int:
        """Spans that are here."""
        return sum(map(len, self.spans.values()))

    def answer_traces(self, body: bytes) -> bytes:
        self.asked.set()
        request = traces.ExportTraceServiceRequest.FromString(body)
        if self.fault == "hangs":
            self.released.wait()
        elif self.fault == "garbage":
            return GARBAGE
        elif self.fault == "rejects":
            sent = sum(
                len(of.spans) for group in request.resource_spans for of in group.scope_spans
            )
            partial = traces.ExportTracePartialSuccess(rejected_spans=sent, error_message="no room")
            return bytes(
                traces.ExportTraceServiceResponse(partial_success=partial).SerializeToString()
            )
        else:
            self.take(request)
        return bytes(traces.ExportTraceServiceResponse().SerializeToString())

    def answer_metrics(self, body: bytes) -> bytes:
        if self.fault == "hangs":
            self.released.wait()
        elif self.fault == "garbage":
            return GARBAGE
        else:
            self.take_metrics(metrics.ExportMetricsServiceRequest.FromString(body))
        return bytes(metrics.ExportMetricsServiceResponse().SerializeToString())


@contextmanager
def open_faulty(protocol: str) -> Iterator[Faulty]:
    """Of `http/protobuf` or `grpc`; without a fault yet."""
    with (_open_http if protocol == "http/protobuf" else _open_grpc)() as collector:
        try:
            yield collector
        finally:
            collector.released.set()
            collector.stop()


@contextmanager
def _open_http() -> Iterator[Faulty]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = STATUS.get(collector.fault, 200)
            answer = b"no"
            if status == 200:
                is_traces = self.path == "/v1/traces"
                answer = (collector.answer_traces if is_traces else collector.answer_metrics)(body)
            collector.asked.set()
            self.send_response(status)
            kind = "text/html" if answer is GARBAGE else "application/x-protobuf"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def stop() -> None:
        if thread.is_alive():
            server.shutdown()
            server.server_close()
            thread.join()

    collector = Faulty(f"http://127.0.0.1:{server.server_port}", stop)
    yield collector


@contextmanager
def _open_grpc() -> Iterator[Faulty]:
    def method(answer: Callable[[bytes], bytes]) -> Any:
        def export(body: bytes, context: Any) -> bytes:
            collector.asked.set()
            if collector.fault in CODE:
                context.abort(CODE[collector.fault], "no")
            return answer(body)

        return grpc.unary_unary_rpc_method_handler(export)  # bytes, as they come

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    collector = Faulty(f"http://127.0.0.1:{port}", lambda: server.stop(grace=None).wait(30))
    for name, answer in (
        ("trace.v1.TraceService", collector.answer_traces),
        ("metrics.v1.MetricsService", collector.answer_metrics),
    ):
        handlers = {"Export": method(answer)}
        service = grpc.method_handlers_generic_handler(f"{SERVICES}.{name}", handlers)
        server.add_generic_rpc_handlers((service,))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    yield collector
