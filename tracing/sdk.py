"""The tracer and the meters of OpenTelemetry's SDK that spans and metrics are exported with.

Imported only when they are: the SDK takes longer to import than the rest of `tracing`. When they
are made, the SDK reads its own standard variables (`OTEL_TRACES_SAMPLER`,
`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_METRIC_EXPORT_INTERVAL`, `OTEL_SDK_DISABLED`).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from typing import Any

from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import NoOpTracer, Tracer

from weightbus import __version__
from weightbus.tracing.ids import new_span_id, new_trace_id

__all__ = ("OwnMeters", "OwnReader", "make_tracer")

_logger = logging.getLogger(__name__)


class EntropyIds(IdGenerator):
    """Ids that a seeded `random` cannot repeat."""

    def generate_trace_id(self) -> int:
        return new_trace_id()

    def generate_span_id(self) -> int:
        return new_span_id()


def make_tracer(
    service: str, processor: SpanProcessor, resource: Mapping[str, str]
) -> Tracer | None:
    """A tracer of a provider of its own; None if `OTEL_SDK_DISABLED` switches the SDK off."""
    attributes = {SERVICE_NAME: service, SERVICE_VERSION: __version__, **resource}
    provider = TracerProvider(
        resource=Resource.create(attributes), id_generator=EntropyIds(), shutdown_on_exit=False
    )
    provider.add_span_processor(processor)
    tracer = provider.get_tracer("weightbus", __version__)
    return None if isinstance(tracer, NoOpTracer) else tracer


class OwnReader(PeriodicExportingMetricReader):
    """Sends the figures of the process that made it. A fork of it has them, too, and the SDK goes
    on there: each worker of a `DataLoader` would send them again, as they were when it began."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._process = os.getpid()
        super().__init__(*args, **kwargs)

    def _receive_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Send the figures that were collected, but for those of a fork."""
        if os.getpid() == self._process:
            super()._receive_metrics(*args, **kwargs)


class OwnMeters:
    """A meter provider of one service, and one reader that sends what it has."""

    def __init__(self, service: str, reader: MetricReader, resource: Mapping[str, str]) -> None:
        attributes = {SERVICE_NAME: service, SERVICE_VERSION: __version__, **resource}
        self._provider = MeterProvider(
            [reader], resource=Resource.create(attributes), shutdown_on_exit=False
        )

    def get(self, name: str) -> Meter:
        """The meter of one part of this program."""
        return self._provider.get_meter(name, __version__)

    def close(self, deadline_s: float) -> threading.Thread:
        """Begin to send the last figures; the thread that does has ended after `deadline_s`, or
        is to be left: a collector that does not answer can hold an exporter up for longer."""

        def shut_down() -> None:
            try:
                self._provider.shutdown(timeout_millis=deadline_s * 1e3)
            except Exception as error:  # noqa: BLE001 - foreign code; there is nobody to raise to
                _logger.warning("the last metrics were not sent: %s", error)

        thread = threading.Thread(target=shut_down, name="weightbus-metrics", daemon=True)
        thread.start()
        return thread
