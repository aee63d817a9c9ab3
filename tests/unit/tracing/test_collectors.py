"""What is known of a collector's answers, where the exporter lets them be heard and where not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from weightbus.tracing.collectors import open_grpc


class Plain(InMemorySpanExporter):
    """An exporter that has none of the names of OpenTelemetry's today."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options, self.exports = options, 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.exports += 1
        return super().export(spans)


def test_spans_are_exported_when_the_answers_cannot_be_heard() -> None:
    made = list[Plain]()

    def make(**options: Any) -> Plain:
        made.append(Plain(**options))
        return made[-1]

    exporter = open_grpc(make, endpoint="http://c:4317")
    assert exporter.export(()) is SpanExportResult.SUCCESS
    assert (made[0].options, made[0].exports) == ({"endpoint": "http://c:4317"}, 1)
    assert exporter.rejected == 0
