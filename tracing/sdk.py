"""The tracer and the meters of OpenTelemetry's SDK that spans and metrics are exported with.

Owns the meter provider of one service, with its readers and the endpoint where Prometheus reads.

Imported only when they are: the SDK takes longer to import than the rest of `tracing`. When they
are made, the SDK reads its own standard variables (`OTEL_TRACES_SAMPLER`,
`OTEL_RESOURCE_ATTRIBUTES`, `OTEL_METRIC_EXPORT_INTERVAL`, `OTEL_SDK_DISABLED`).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from opentelemetry.metrics import Meter, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExporter,
    MetricExportResult,
    MetricReader,
    MetricsData,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import NoOpTracer, Tracer

from weightbus import __version__
from weightbus.tracing.attributes import CAUSE
from weightbus.tracing.errors import PrometheusMissing, PrometheusUnavailable
from weightbus.tracing.hush import hushed
from weightbus.tracing.ids import new_span_id, new_trace_id
from weightbus.tracing.lost import cause_told, lost_told
from weightbus.tracing.metric_names import SIGNAL, TELEMETRY_LOST, TELEMETRY_METER
from weightbus.tracing.otlp import (
    ExportLosses,
    OtlpSettings,
    PrometheusSettings,
    open_metric_exporter,
)

if TYPE_CHECKING:
    from weightbus.tracing.prometheus import OwnEndpoint

__all__ = ("OwnMeters", "make_tracer", "open_meters")

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


class CountingExporter(MetricExporter):
    """Another exporter, with a count of the exports that it gave up."""

    def __init__(self, exporter: MetricExporter) -> None:
        super().__init__(exporter._preferred_temporality, exporter._preferred_aggregation)
        self._exporter = exporter
        self.refused = 0
        self.last_error = ""

    def export(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> MetricExportResult:
        """Never raises, and logs nothing: what it cannot send is counted, and told at the end."""
        with hushed() as said:
            try:
                result = self._exporter.export(metrics_data, timeout_millis, **kwargs)
            except Exception as error:  # noqa: BLE001 - foreign code
                said.last = f"{type(error).__name__}: {error}"
                result = MetricExportResult.FAILURE
        if result is not MetricExportResult.SUCCESS:
            self.refused += 1
            self.last_error = said.last or self.last_error
        return result

    def force_flush(self, timeout_millis: float = 10_000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        with hushed():
            self._exporter.shutdown(timeout_millis, **kwargs)


class OwnReader(PeriodicExportingMetricReader):
    """Sends the figures of the process that made it. A fork of it has them, too, and the SDK goes
    on there: each worker of a `DataLoader` would send them again, as they were when it began."""

    def __init__(self, exporter: MetricExporter, endpoint: str) -> None:
        self.endpoint, self._process = endpoint, os.getpid()
        self.counted = CountingExporter(exporter)
        super().__init__(self.counted)

    def _receive_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Send the figures that were collected, but for those of a fork."""
        if os.getpid() == self._process:
            super()._receive_metrics(*args, **kwargs)


class OwnMeters:
    """A meter provider of one service, and its readers; made by `open_meters`."""

    def __init__(
        self,
        service: str,
        resource: Mapping[str, str],
        sending: MetricReader | None,
        endpoint: OwnEndpoint | None,
    ) -> None:
        attributes = {SERVICE_NAME: service, SERVICE_VERSION: __version__, **resource}
        self._service, self._sending, self._endpoint = service, sending, endpoint
        readers = [] if endpoint is None else [endpoint.reader]  # first: it is shut down at once
        self._provider = MeterProvider(
            readers if sending is None else [*readers, sending],
            resource=Resource.create(attributes),
            shutdown_on_exit=False,
        )

    @property
    def url(self) -> str:
        """Where Prometheus reads; empty: nowhere."""
        return "" if self._endpoint is None else self._endpoint.url

    @property
    def refused(self) -> int:
        """Exports that did not arrive, so far."""
        return self._sending.counted.refused if isinstance(self._sending, OwnReader) else 0

    def get(self, name: str) -> Meter:
        """The meter of one part of this program."""
        return self._provider.get_meter(name, __version__)

    def tell_losses(self, losses: Callable[[], ExportLosses]) -> None:
        """Let what is lost be a metric, too. `losses` is called by readers' threads."""
        self.get(TELEMETRY_METER).create_observable_counter(
            TELEMETRY_LOST.name,
            callbacks=[lambda options: _points(losses())],
            unit=TELEMETRY_LOST.unit,
            description=TELEMETRY_LOST.told,
        )

    def close(self, deadline_s: float) -> None:
        """Send the last figures, for at most `deadline_s`, and end the endpoint: a collector that
        does not answer can hold an exporter up for longer, whose thread is left then."""

        def shut_down() -> None:
            try:
                self._provider.shutdown(timeout_millis=deadline_s * 1e3)
            except Exception as error:  # noqa: BLE001 - foreign code; there is nobody to raise to
                _logger.warning("the last metrics were not sent: %s", error)

        thread = threading.Thread(target=shut_down, name="weightbus-metrics", daemon=True)
        thread.start()
        thread.join(deadline_s)
        self._tell_refused(is_sending=thread.is_alive())
        if self._endpoint is not None:
            self._endpoint.close()

    def _tell_refused(self, *, is_sending: bool) -> None:
        """`is_sending`: the last figures are given up, too."""
        if not isinstance(self._sending, OwnReader):
            return
        counted = self._sending.counted
        lost = counted.refused + is_sending
        if lost:
            told = lost_told(lost, "export of metrics", "exports of metrics", self._service)
            why = cause_told(self._sending.endpoint, counted.last_error)
            _logger.warning("%s; %s", told, why)


def open_meters(
    service: str,
    otlp: OtlpSettings | None,
    reader: MetricReader | None,
    resource: Mapping[str, str],
) -> OwnMeters | None:
    """Meters whose metrics are sent to `otlp.metrics_endpoint`, or else to `reader`, and read at
    `otlp.prometheus`; None if there is none of these.

    An address that is another process's, or not of this host, is warned of and gone without: who
    updates weights does not fail for want of figures.

    Raises:
        ExporterMissing: they are to be sent, but the extra `otlp` is not installed.
        PrometheusMissing: they are to be read, but the extra `prometheus` is not installed.
    """
    exporter, url = None, ""
    if otlp is not None and otlp.metrics_endpoint and reader is None:
        exporter, url = open_metric_exporter(otlp), otlp.metrics_endpoint
    endpoint = None
    if otlp is not None and otlp.prometheus is not None:
        endpoint = _endpoint(otlp.prometheus)
    if exporter is not None:
        reader = OwnReader(exporter, url)  # last: it begins a thread
    if reader is None and endpoint is None:
        return None
    return OwnMeters(service, resource, reader, endpoint)


def _endpoint(settings: PrometheusSettings) -> OwnEndpoint | None:
    try:
        from weightbus.tracing.prometheus import open_endpoint
    except ImportError as error:
        raise PrometheusMissing(settings.url) from error
    try:
        return open_endpoint(settings)
    except PrometheusUnavailable as error:
        _logger.warning("%s", error)
        return None


def _points(losses: ExportLosses) -> list[Observation]:
    counts = {
        ("spans", "queue_full"): losses.queue_full,
        ("spans", "refused"): losses.refused,
        ("spans", "unsent"): losses.unsent,
        ("metrics", "refused"): losses.metrics_refused,
    }
    return [
        Observation(count, {SIGNAL: signal, CAUSE: cause})
        for (signal, cause), count in counts.items()
    ]
