"""What a publisher measures arrives where metrics are read: figures, units, attributes."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from weightbus.tracing.metrics import METER, PublisherMetrics
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
        if scope.scope.name == METER
    }


def test_every_figure_is_there_with_its_unit_when_a_publisher_measures() -> None:
    reader = InMemoryMetricReader()
    with open_telemetry("trainer", reader=reader) as telemetry:
        metrics = PublisherMetrics(telemetry.meter(METER), model="m", producer="t", rank=3)
        metrics.blocked(0.02)
        metrics.blocked(2.0)
        metrics.published()
        metrics.skipped("busy")
        metrics.skipped("busy")
        metrics.skipped("ranks")
        metrics.slots({"host": 100, "device": 200})
        points = points_of(reader)
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
    metrics = PublisherMetrics(Telemetry().meter(METER), model="m", producer="t", rank=0)
    metrics.blocked(1.0)
    metrics.published()
    metrics.skipped("failed")
    metrics.slots({"host": 1})
