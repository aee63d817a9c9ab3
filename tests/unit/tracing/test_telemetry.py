"""Spans and their twins agree; ids are always there; failures are told by both."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import anyio
import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from weightbus.schemas.progress import StageComplete
from weightbus.tracing.attributes import Destination
from weightbus.tracing.context import SpanRef
from weightbus.tracing.telemetry import StageScope, Telemetry, open_telemetry

SCOPE = StageScope("minilm", 7, "v7-1", "a")
READY = Destination.of_ready("weightbus", "minilm", client="c", url="nats://h")
START_NS = 1_700_000_000_000_000_000


def assert_twins(span: ReadableSpan, twin: StageComplete) -> None:
    """A stage's span and its `StageComplete` say the same."""
    assert span.context is not None
    assert twin.trace_id == format_trace_id(span.context.trace_id)
    assert twin.span_id == format_span_id(span.context.span_id)
    parent = "" if span.parent is None else format_span_id(span.parent.span_id)
    assert twin.parent_span_id == parent
    assert (twin.start_ns, twin.end_ns) == (span.start_time, span.end_time)
    assert span.name == twin.stage
    said = {
        "weightbus.model": twin.model,
        "weightbus.version": twin.version,
        "weightbus.round": twin.round,
        "weightbus.engine": twin.engine,
        "weightbus.stage": twin.stage,
        "weightbus.bytes": twin.bytes,
        "weightbus.rank": twin.rank,
        "weightbus.route": twin.route,
    }
    attributes = dict(span.attributes or {})
    attributes.pop("error.type", None)
    assert attributes == {key: value for key, value in said.items() if value is not None}
    assert span.status.is_ok is twin.ok
    assert (span.status.description or "") == twin.error


def test_stage_shortens_its_error_when_it_exceeds_the_limit_of_a_reason() -> None:
    twins = list[StageComplete]()
    Telemetry().record_stage(
        twins.append, SCOPE, "h2d", start_ns=START_NS, end_ns=START_NS, error="x" * 5000
    )
    assert len(twins[0].error) == 4096
    assert twins[0].error.endswith("...")


def test_span_tells_the_reason_and_reraises_when_its_block_fails() -> None:
    exporter = InMemorySpanExporter()
    with (
        open_telemetry("trainer", exporter=exporter) as telemetry,
        pytest.raises(OSError, match="no such block"),
        telemetry.span("step"),
    ):
        raise OSError("no such block")
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "OSError: no such block"
    assert dict(span.attributes or {})["error.type"] == "OSError"


def test_span_is_marked_as_failed_when_it_is_cancelled() -> None:
    exporter = InMemorySpanExporter()

    async def main() -> None:
        with (
            open_telemetry("trainer", exporter=exporter) as telemetry,
            anyio.CancelScope() as scope,
            telemetry.span("step"),
        ):
            scope.cancel()
            await anyio.sleep_forever()

    anyio.run(main)
    (span,) = exporter.get_finished_spans()
    assert "CancelledError" in (span.status.description or "")


def test_recorded_stage_agrees_with_its_twin() -> None:
    exporter, twins = InMemorySpanExporter(), list[StageComplete]()
    parent = SpanRef("a" * 32, "b" * 16)
    with open_telemetry("consumer", exporter=exporter) as telemetry:
        ref = telemetry.record_stage(
            twins.append, SCOPE, "h2d", start_ns=START_NS, end_ns=START_NS + 5,
            bytes=10, rank=3, route="p2p", parent=parent,
        )  # fmt: skip
    (span,) = exporter.get_finished_spans()
    assert_twins(span, twins[0])
    assert (span.start_time, span.end_time) == (START_NS, START_NS + 5)
    assert span.kind is SpanKind.INTERNAL
    assert (ref.trace_id, ref.span_id) == (parent.trace_id, twins[0].span_id)


def test_recorded_stage_tells_its_error_twice_when_it_failed() -> None:
    exporter, twins = InMemorySpanExporter(), list[StageComplete]()
    with open_telemetry("consumer", exporter=exporter) as telemetry:
        telemetry.record_stage(
            twins.append, SCOPE, "reload", start_ns=START_NS, end_ns=START_NS + 5, rank=0,
            error="TornRead: segment s",
        )  # fmt: skip
    (span,) = exporter.get_finished_spans()
    assert_twins(span, twins[0])
    assert (twins[0].ok, twins[0].error) == (False, "TornRead: segment s")
    assert dict(span.attributes or {})["error.type"] == "TornRead"


def test_span_is_marked_as_failed_when_nothing_was_raised() -> None:
    exporter = InMemorySpanExporter()
    with open_telemetry("consumer", exporter=exporter) as telemetry:
        update = telemetry.begin_update(READY, SCOPE, start_ns=START_NS, parent=None)
        update.fail("DigestMismatch: weights digest is 1")
        update.end(START_NS + 1)
    (span,) = exporter.get_finished_spans()
    assert span.status.description == "DigestMismatch: weights digest is 1"
    assert dict(span.attributes or {})["error.type"] == "DigestMismatch"


def test_recorded_stage_lasts_no_time_when_its_clock_was_set_back() -> None:
    twins = list[StageComplete]()
    Telemetry().record_stage(twins.append, SCOPE, "h2d", start_ns=START_NS, end_ns=START_NS - 9)
    assert (twins[0].start_ns, twins[0].end_ns) == (START_NS, START_NS)


def test_telemetry_makes_ids_of_one_trace_when_nothing_is_exported() -> None:
    telemetry, twins = Telemetry(), list[StageComplete]()
    with telemetry.publish_span(READY, model="minilm", version=7, producer="t") as publish:
        publish.set("weightbus.bytes", 1)
    stage = telemetry.record_stage(
        twins.append, SCOPE, "fetch", start_ns=START_NS, end_ns=START_NS + 1, parent=publish.ref
    )
    assert stage.trace_id == publish.ref.trace_id == twins[0].trace_id != "0" * 32
    assert stage.span_id == twins[0].span_id
    assert twins[0].parent_span_id == publish.ref.span_id != stage.span_id


def test_ids_differ_when_the_program_seeds_its_random_numbers() -> None:
    exporter = InMemorySpanExporter()
    refs = []
    with open_telemetry("trainer", exporter=exporter) as exporting:
        for telemetry in (exporting, exporting, Telemetry(), Telemetry()):
            random.seed(0)
            with telemetry.span("step") as span:
                refs.append(span.ref)
    assert len({ref.trace_id for ref in refs}) == 4
    assert len({ref.span_id for ref in refs}) == 4


def test_update_is_a_consumer_span_in_the_trace_of_publish_when_the_context_came_in_headers() -> (
    None
):
    trainer, engine = InMemorySpanExporter(), InMemorySpanExporter()
    with (
        open_telemetry("trainer", exporter=trainer) as telemetry,
        telemetry.publish_span(READY, model="minilm", version=7, producer="t") as publish,
    ):
        headers = publish.ref.headers()
    with open_telemetry("consumer", exporter=engine) as telemetry:
        telemetry.begin_update(
            READY,
            SCOPE,
            start_ns=START_NS,
            parent=SpanRef.from_headers(headers),
            message_id="minilm/7/t",
        ).end(START_NS + 1)
    (sent,), (processed,) = trainer.get_finished_spans(), engine.get_finished_spans()
    assert sent.name == "publish weightbus.{model}.checkpoint.ready"
    assert processed.name == "update weightbus.{model}.checkpoint.ready"
    assert (sent.kind, processed.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert sent.parent is None
    assert sent.context is not None
    assert processed.parent is not None
    assert processed.parent.is_remote
    assert processed.parent.span_id == sent.context.span_id
    assert processed.parent.trace_id == sent.context.trace_id
    assert [link.context.span_id for link in processed.links] == [sent.context.span_id]
    assert dict(sent.attributes or {}) == {
        "messaging.system": "nats",
        "messaging.operation.type": "send",
        "messaging.operation.name": "publish",
        "messaging.destination.name": "weightbus.minilm.checkpoint.ready",
        "messaging.destination.template": "weightbus.{model}.checkpoint.ready",
        "messaging.client.id": "c",
        "server.address": "h",
        "server.port": 4222,
        "weightbus.model": "minilm",
        "weightbus.version": 7,
        "weightbus.producer": "t",
        "weightbus.clock.offset_ns": 0,
    }
    attributes = dict(processed.attributes or {})
    assert attributes["messaging.operation.type"] == "process"
    assert attributes["messaging.message.id"] == "minilm/7/t"
    assert attributes["weightbus.round"] == "v7-1"


def test_span_is_not_exported_but_has_ids_when_the_sender_did_not_sample() -> None:
    exporter = InMemorySpanExporter()
    parent = SpanRef("a" * 32, "b" * 16, sampled=False)
    with (
        open_telemetry("consumer", exporter=exporter) as telemetry,
        telemetry.span("update", parent=parent) as span,
    ):
        pass
    assert exporter.get_finished_spans() == ()
    assert (span.ref.trace_id, span.ref.sampled) == (parent.trace_id, False)
    assert span.ref.span_id != parent.span_id


def test_span_carries_its_links_and_resource() -> None:
    exporter = InMemorySpanExporter()
    other = SpanRef("c" * 32, "d" * 16)
    with (
        open_telemetry("consumer", exporter=exporter, resource={"host.id": "h1"}) as telemetry,
        telemetry.span("round", links=[other], attributes={"weightbus.round": "r"}),
    ):
        pass
    (span,) = exporter.get_finished_spans()
    assert [SpanRef.of(link.context) for link in span.links] == [other]
    assert span.resource.attributes["service.name"] == "consumer"
    assert span.resource.attributes["host.id"] == "h1"


class HangingExporter(InMemorySpanExporter):
    """Takes spans when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.let.wait(30)
        return super().export(spans)


def test_last_metrics_tell_the_spans_that_were_given_up_at_the_end() -> None:
    spans, told = HangingExporter(), list[dict[str, float]]()

    class Metrics(InMemoryMetricReader):
        """What a collector would have got last."""

        def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
            data = self.get_metrics_data()
            assert data is not None
            (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
            assert metric.name == "weightbus.telemetry.lost"
            told.append(
                {
                    str((p.attributes or {})["weightbus.cause"]): float(p.value)
                    for p in metric.data.data_points
                    if isinstance(p, NumberDataPoint)
                    and (p.attributes or {})["weightbus.signal"] == "spans"
                }
            )
            super().shutdown(timeout_millis, **kwargs)

    with (
        open_telemetry("x", exporter=spans, reader=Metrics(), shutdown_s=0.5) as telemetry,
        telemetry.span("a"),
    ):
        pass
    spans.let.set()
    assert told == [{"queue_full": 0.0, "refused": 0.0, "unsent": 1.0}]
    assert telemetry.losses.unsent == 1
