"""What a publisher measures arrives where metrics are read: figures, units, attributes."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import (
    InMemoryMetricReader,
    MetricExporter,
    MetricExportResult,
)

from weightbus.tracing.metric_names import PRODUCER_METER
from weightbus.tracing.metrics import PublisherMetrics
from weightbus.tracing.otlp import OtlpSettings
from weightbus.tracing.telemetry import Telemetry, open_telemetry


def points_of(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    """By the name of the metric, after its unit: `weightbus.slot.size By`."""
    data = reader.get_metrics_data()
    if data is None:
        return {}
    return {
        f"{metric.name} {metric.unit}": list(metric.data.data_points)
        for group in data.resource_metrics
        for scope in group.scope_metrics
        for metric in scope.metrics
        if scope.scope.name == PRODUCER_METER
    }


def test_every_figure_is_there_with_its_unit_when_a_publisher_measures() -> None:
    reader = InMemoryMetricReader()
    with open_telemetry("trainer", reader=reader) as telemetry:
        metrics = PublisherMetrics(telemetry.meter(PRODUCER_METER), model="m", producer="t", rank=3)
        metrics.blocked(0.02, 0.0)
        metrics.blocked(2.0, 1.5)
        metrics.published()
        metrics.skipped("busy")
        metrics.skipped("busy")
        metrics.skipped("ranks")
        metrics.slots({"host": 100, "device": 200})
        with metrics.waiting():
            waiting = points_of(reader)["weightbus.slots.waiting {slot}"]
        points = points_of(reader)
    (waited,) = points["weightbus.publish.waited s"]
    assert (waited.count, waited.sum) == (2, 1.5)
    assert [p.value for p in waiting] == [1]
    assert [p.value for p in points["weightbus.slots.waiting {slot}"]] == [0]
    (blocked,) = points["weightbus.publish.blocked s"]
    assert (blocked.count, blocked.sum) == (2, 2.02)
    assert [n for n, count in enumerate(blocked.bucket_counts) if count] == [3, 7]
    (published,) = points["weightbus.versions.published {version}"]
    assert published.value == 1
    of = {"weightbus.model": "m", "weightbus.producer": "t", "weightbus.rank": 3}
    assert dict(published.attributes) == of
    skipped = points["weightbus.versions.skipped {version}"]
    assert {p.attributes["weightbus.cause"]: p.value for p in skipped} == {"busy": 2, "ranks": 1}
    slots = points["weightbus.slot.size By"]
    assert {p.attributes["weightbus.memory"]: p.value for p in slots} == {
        "host": 100,
        "device": 200,
    }


def test_nothing_is_kept_when_nobody_reads_metrics() -> None:
    metrics = PublisherMetrics(Telemetry().meter(PRODUCER_METER), model="m", producer="t", rank=0)
    metrics.blocked(1.0, 0.0)
    metrics.published()
    metrics.skipped("failed")
    metrics.slots({"host": 1})


class PipeExporter(MetricExporter):
    """Says which process has sent something."""

    def __init__(self, end: int) -> None:
        super().__init__()
        self._end = end

    def export(self, *args: object, **kwargs: object) -> MetricExportResult:
        os.write(self._end, b"%d\n" % os.getpid())
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 0) -> bool:
        return True

    def shutdown(self, timeout_millis: float = 0, **kwargs: object) -> None:
        """It holds nothing."""


def test_forks_send_nothing_when_a_trainer_that_sends_metrics_has_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, write = os.pipe()
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    monkeypatch.setattr("weightbus.tracing.sdk.open_metric_exporter", lambda _: PipeExporter(write))
    metrics_alone = OtlpSettings(endpoint="", metrics_endpoint="http://collector/v1/metrics")
    with open_telemetry("trainer", otlp=metrics_alone) as telemetry:
        PublisherMetrics(
            telemetry.meter(PRODUCER_METER), model="m", producer="t", rank=0
        ).published()
        worker = os.fork()
        if worker == 0:
            time.sleep(0.3)
            os._exit(0)
        assert os.waitpid(worker, 0) == (worker, 0)
    os.close(write)
    with open(read, encoding="ascii") as lines:
        assert {int(line) for line in lines} == {os.getpid()}
