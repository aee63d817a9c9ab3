"""Spans arrive at a collector as one whole tree; a broken collector costs nothing but spans."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.integration.tracing.collector import (
    free_port,
    hanging_collector,
    open_collector,
)
from weightbus.schemas.progress import StageComplete
from weightbus.tracing.attributes import Destination
from weightbus.tracing.metric_names import PRODUCER_METER
from weightbus.tracing.metrics import PublisherMetrics
from weightbus.tracing.otlp import OtlpSettings
from weightbus.tracing.telemetry import StageScope, open_telemetry

READY = Destination.of_ready("weightbus", "minilm", client="c", url="nats://127.0.0.1:4222")
SCOPE = StageScope("minilm", 7, "v7-1", "a")

CONSUMER = """
import json, os, sys, time
from weightbus.tracing.attributes import Destination
from weightbus.tracing.context import SpanRef
from weightbus.tracing.otlp import OtlpSettings
from weightbus.tracing.telemetry import StageScope, open_telemetry

headers = json.loads(sys.argv[1])
ready = Destination.of_ready("weightbus", "minilm", client="c", url="nats://127.0.0.1:4222")
scope, twins = StageScope("minilm", 7, "v7-1", "a"), []
with open_telemetry(
    "consumer", otlp=OtlpSettings.from_env(os.environ), shutdown_s=30
) as telemetry:
    update = telemetry.begin_update(
        ready, scope, start_ns=time.time_ns(), parent=SpanRef.from_headers(headers)
    )
    def record(stage, parent, **options):
        now_ns = time.time_ns()
        return telemetry.record_stage(
            twins.append, scope, stage, start_ns=now_ns, end_ns=now_ns, parent=parent, **options
        )
    record("negotiate", update.ref)
    for rank in (0, 1):
        fetch = record("fetch", update.ref, rank=rank, route="local", bytes=4096)
        record("reload", fetch, rank=rank, route="local")
    record("commit", update.ref, error="TimeoutError: no commit")
    update.end(time.time_ns())
print(json.dumps([[t.trace_id, t.span_id, t.parent_span_id, t.start_ns, t.end_ns] for t in twins]))
"""


def test_collector_has_one_whole_trace_when_two_processes_export_over_http() -> None:
    with open_collector() as collector:
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20t",
        }
        with (
            open_telemetry(
                "trainer", otlp=OtlpSettings.from_env(environ), shutdown_s=30
            ) as trainer,
            trainer.publish_span(READY, model="minilm", version=7, producer="t") as publish,
        ):
            headers = json.dumps(publish.ref.headers())
        done = subprocess.run(
            [sys.executable, "-c", CONSUMER, headers],
            env=os.environ | environ, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    twins = json.loads(done.stdout)
    (published,), consumed = collector.spans["trainer"], collector.spans["consumer"]
    assert all(sent["authorization"] == "Bearer t" for sent in collector.headers)
    assert_whole_tree([published, *consumed], root=published)
    stages = {span.span_id.hex(): span for span in consumed if span.kind == Span.SPAN_KIND_INTERNAL}
    assert len(stages) == len(twins) == 6
    for trace_id, span_id, parent_span_id, start_ns, end_ns in twins:
        span = stages[span_id]
        assert span.trace_id.hex() == trace_id
        assert span.parent_span_id.hex() == parent_span_id
        assert (span.start_time_unix_nano, span.end_time_unix_nano) == (start_ns, end_ns)
    failed = [span for span in consumed if span.status.code == span.status.STATUS_CODE_ERROR]
    assert [(span.name, span.status.message) for span in failed] == [
        ("commit", "TimeoutError: no commit")
    ]


def assert_whole_tree(spans: list[Span], *, root: Span) -> None:
    """One trace, one root, every parent is there, no time runs backwards."""
    assert {span.trace_id for span in spans} == {root.trace_id}
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    assert [span.name for span in spans if not span.parent_span_id] == [root.name]
    orphans = [s.name for s in spans if s.parent_span_id and s.parent_span_id not in by_id]
    assert orphans == []
    for span in spans:
        assert span.end_time_unix_nano >= span.start_time_unix_nano


def test_collector_has_the_figures_when_a_service_ends() -> None:
    with open_collector() as collector:
        settings = OtlpSettings.from_env({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url})
        with open_telemetry("trainer", otlp=settings, shutdown_s=30) as telemetry:
            metrics = PublisherMetrics(
                telemetry.meter(PRODUCER_METER), model="m", producer="t", rank=0
            )
            metrics.skipped("busy")
    (point,) = collector.metrics["trainer"]["weightbus.versions.skipped"].sum.data_points
    assert point.as_int == 1
    assert "weightbus.publish.blocked" not in collector.metrics["trainer"], "nothing was measured"


def test_end_is_bounded_when_the_collector_takes_no_metrics() -> None:
    with hanging_collector() as url:
        settings = OtlpSettings.from_env({"OTEL_EXPORTER_OTLP_ENDPOINT": url})
        before = time.monotonic()
        with open_telemetry("trainer", otlp=settings, shutdown_s=0.3) as telemetry:
            metrics = PublisherMetrics(
                telemetry.meter(PRODUCER_METER), model="m", producer="t", rank=0
            )
            metrics.published()
        assert time.monotonic() - before < 3


@pytest.mark.parametrize("status", [400, 503])
def test_update_goes_on_and_losses_are_counted_when_the_collector_refuses(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with open_collector() as collector:
        collector.status = status
        run_one_update(collector.url)
    assert collector.spans == {}
    assert "2 spans of consumer were lost" in caplog.text


def test_update_goes_on_and_losses_are_counted_when_no_collector_is_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    run_one_update(url)
    assert "2 spans of consumer were lost" in caplog.text
    assert f"{url}/v1/traces" in caplog.text


def test_shutdown_is_bounded_and_losses_are_counted_when_the_collector_hangs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with hanging_collector() as url:
        before = time.monotonic()
        run_one_update(url)
        assert time.monotonic() - before < 20
    assert "2 unsent at the end" in caplog.text


def run_one_update(url: str) -> None:
    """An update with one stage, under telemetry that may wait 0.2 s at its end."""
    settings = OtlpSettings.from_env({"OTEL_EXPORTER_OTLP_ENDPOINT": url})
    twins = list[StageComplete]()
    with open_telemetry("consumer", otlp=settings, shutdown_s=0.2) as telemetry:
        update = telemetry.begin_update(READY, SCOPE, start_ns=time.time_ns(), parent=None)
        now_ns = time.time_ns()
        telemetry.record_stage(
            twins.append, SCOPE, "fetch", start_ns=now_ns, end_ns=now_ns, parent=update.ref
        )
        update.end(time.time_ns())
    assert [twin.ok for twin in twins] == [True]
