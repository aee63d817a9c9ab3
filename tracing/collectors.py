"""What a collector makes of what it is sent, of which OpenTelemetry's exporters tell half.

They take a batch for delivered that the collector says it has thrown away (`partial_success`), or
that a web server answered that is no collector; and what has failed they log, and do not raise.
Here whoever sends learns of both.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import requests
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from weightbus.tracing.errors import CollectorRefused
from weightbus.tracing.hush import hushed

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

__all__ = ("CollectorExporter", "open_grpc", "open_http")

_logger = logging.getLogger(__name__)

CREDENTIAL_VARIABLES: Final = (
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER",
)


class Answers:
    """What the collector said of the batch that was sent last."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Another batch is sent."""
        self.rejected, self.why = 0, ""
        self.is_no_collector = False

    def take(self, answer: Any) -> None:
        """An `ExportTraceServiceResponse`."""
        partial = answer.partial_success
        self.rejected, self.why = partial.rejected_spans, partial.error_message

    def take_http(self, response: Any, **_: Any) -> None:
        """Of `requests`. Some collectors answer in JSON, or nothing: that is well."""
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip()
        self.is_no_collector = response.ok and kind == "text/html"
        if response.ok and kind == "application/x-protobuf":
            try:
                self.take(ExportTraceServiceResponse.FromString(response.content))  # type: ignore[no-untyped-call]
            except DecodeError:
                self.is_no_collector = True


class CollectorExporter(SpanExporter):
    """Another exporter, which logs nothing; its `export` raises what that would have logged."""

    def __init__(self, exporter: SpanExporter, answers: Answers) -> None:
        self._exporter, self._answers = exporter, answers

    @property
    def rejected(self) -> int:
        """Spans of the last batch that the collector has thrown away, as it says."""
        return self._answers.rejected

    @property
    def why(self) -> str:
        """What it says to that."""
        return self._answers.why

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """
        Raises:
            CollectorRefused: it did not take the batch, or is no collector.
        """
        self._answers.forget()
        with hushed() as said:
            result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            raise CollectorRefused(said.last)
        if self._answers.is_no_collector:
            raise CollectorRefused("what answers there is no collector of OTLP")
        return result

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def shutdown(self) -> None:
        with hushed():
            self._exporter.shutdown()


def open_http(make: Callable[..., SpanExporter], **options: Any) -> CollectorExporter:
    """With a session of its own, whose answers are looked at; not where the SDK is told by its
    variable to take one that knows credentials."""
    answers = Answers()
    if not any(os.environ.get(variable) for variable in CREDENTIAL_VARIABLES):
        options["session"] = session = requests.Session()
        session.hooks["response"].append(answers.take_http)
    return CollectorExporter(make(**options), answers)


def open_grpc(make: Callable[..., Any], **options: Any) -> CollectorExporter:
    """The exporter throws answers away, and makes its stub anew with every connection: so that is
    taken where it makes it, which is no public name of it: where a version of it has no such name,
    what the collector threw away is not heard of."""
    answers, exporter = Answers(), make(**options)
    stub, client = getattr(exporter, "_stub", None), getattr(exporter, "_client", None)
    if callable(stub) and hasattr(client, "Export"):
        exporter._stub = lambda channel: _HeardStub(stub(channel), answers)
        exporter._client = _HeardStub(client, answers)
    else:
        _logger.debug("the exporter does not let the collector's answers be heard")
    return CollectorExporter(exporter, answers)


class _HeardStub:
    """That of the trace service, with its answers heard."""

    def __init__(self, stub: Any, answers: Answers) -> None:
        self._stub, self._answers = stub, answers

    def Export(self, **call: Any) -> Any:  # noqa: N802 - gRPC's name
        """One request."""
        answer = self._stub.Export(**call)
        self._answers.take(answer)
        return answer
