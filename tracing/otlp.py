"""Where spans and metrics are sent to, if anywhere: OTLP settings, exporters, the losses.

Reads nothing by itself: `OtlpSettings.from_env` is given the environment by an entry point. The
exporters are the extra `otlp`; they are imported only when an endpoint is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args
from urllib.parse import unquote, urlsplit

from msgspec import Struct

from weightbus.tracing.errors import ExporterMissing, TelemetryInvalid

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter
    from opentelemetry.sdk.trace.export import SpanExporter

__all__ = (
    "EXPORT_TIMEOUT_S",
    "ExportLosses",
    "OtlpProtocol",
    "OtlpSettings",
    "open_exporter",
    "open_metric_exporter",
)

OtlpProtocol = Literal["http/protobuf", "grpc"]

EXPORT_TIMEOUT_S: Final = 5
"""How long one batch may take, retries included, before it is given up."""

_EXPORTER_PACKAGES: Final[Mapping[OtlpProtocol, str]] = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc",
}


class OtlpSettings(Struct, frozen=True, kw_only=True):
    """One collector."""

    endpoint: str
    """URL that spans are sent to: for HTTP the whole of it, `http://collector:4318/v1/traces`; for
    gRPC `http://collector:4317` (`https` for TLS). Empty: they are not sent."""
    protocol: OtlpProtocol = "http/protobuf"
    headers: Mapping[str, str] = {}
    """Sent with every request: authorisation of the collector, for example."""
    metrics_endpoint: str = ""
    """URL that metrics are sent to, by the same protocol and with the same headers: for HTTP
    `http://collector:4318/v1/metrics`. Empty: they are not sent."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> OtlpSettings | None:
        """The standard variables `OTEL_EXPORTER_OTLP_[TRACES_]ENDPOINT`, `PROTOCOL`, `HEADERS`.

        Metrics are sent, too, where `OTEL_EXPORTER_OTLP_[METRICS_]ENDPOINT` says so, unless
        `OTEL_METRICS_EXPORTER` is `none`. None if no endpoint is set, or `OTEL_SDK_DISABLED` is
        true.

        Raises:
            TelemetryInvalid: a variable holds what cannot be used.
        """
        for_traces = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "").strip()
        for_metrics = environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "").strip()
        for_all = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()
        with_metrics = environ.get("OTEL_METRICS_EXPORTER", "").strip().lower() != "none"
        if not (for_traces or for_all or (for_metrics and with_metrics)):
            return None
        if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return None
        protocol = _protocol(_variable(environ, "PROTOCOL") or "http/protobuf")
        endpoint = for_traces or _with_path(for_all, "/v1/traces", protocol)
        _check_url("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        metrics_endpoint = ""
        if with_metrics:
            metrics_endpoint = for_metrics or _with_path(for_all, "/v1/metrics", protocol)
            _check_url("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", metrics_endpoint)
        return cls(
            endpoint=endpoint,
            protocol=protocol,
            headers=_headers(_variable(environ, "HEADERS")),
            metrics_endpoint=metrics_endpoint,
        )


class ExportLosses(Struct, frozen=True, kw_only=True):
    """Spans that never reached the collector, by cause."""

    queue_full: int = 0
    """Ended while the queue was full, or after the telemetry was closed."""
    refused: int = 0
    """Given up by the exporter: no connection, refused, or no answer in time."""
    unsent: int = 0
    """Still waiting, or on their way, when the deadline of the shutdown came."""

    @property
    def total(self) -> int:
        return self.queue_full + self.refused + self.unsent


def open_exporter(settings: OtlpSettings) -> SpanExporter:
    """The exporter of OpenTelemetry for these settings. It connects when it first exports.

    Raises:
        ExporterMissing: the extra `otlp` is not installed.
    """
    exporter = _module_of(settings, "trace_exporter").OTLPSpanExporter(
        endpoint=settings.endpoint, headers=dict(settings.headers), timeout=EXPORT_TIMEOUT_S
    )
    return cast("SpanExporter", exporter)


def open_metric_exporter(settings: OtlpSettings) -> MetricExporter:
    """That of metrics, for `metrics_endpoint`.

    Raises:
        ExporterMissing: the extra `otlp` is not installed.
    """
    exporter = _module_of(settings, "metric_exporter").OTLPMetricExporter(
        endpoint=settings.metrics_endpoint,
        headers=dict(settings.headers),
        timeout=EXPORT_TIMEOUT_S,
    )
    return cast("MetricExporter", exporter)


def _module_of(settings: OtlpSettings, name: str) -> Any:
    try:
        return import_module(f"{_EXPORTER_PACKAGES[settings.protocol]}.{name}")
    except ImportError as error:
        endpoint = settings.endpoint or settings.metrics_endpoint
        raise ExporterMissing(settings.protocol, endpoint) from error


def _with_path(for_all: str, path: str, protocol: OtlpProtocol) -> str:
    """By the OTLP specification the path is added to the variable for all signals only."""
    return for_all.rstrip("/") + path if for_all and protocol != "grpc" else for_all


def _check_url(variable: str, endpoint: str) -> None:
    """
    Raises:
        TelemetryInvalid
    """
    if endpoint and urlsplit(endpoint).scheme not in ("http", "https"):
        raise TelemetryInvalid(variable, endpoint, "must begin with http:// or https://")


def _variable(environ: Mapping[str, str], name: str) -> str:
    for_traces = environ.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}", "").strip()
    return for_traces or environ.get(f"OTEL_EXPORTER_OTLP_{name}", "").strip()


def _protocol(value: str) -> OtlpProtocol:
    for protocol in get_args(OtlpProtocol):
        if value == protocol:
            return cast("OtlpProtocol", protocol)
    raise TelemetryInvalid(
        "OTEL_EXPORTER_OTLP_PROTOCOL", value, f"must be one of {', '.join(get_args(OtlpProtocol))}"
    )


def _headers(value: str) -> dict[str, str]:
    """`name=value,name=value`, percent-encoded; names in lower case, as gRPC demands."""
    headers = {}
    for number, part in enumerate(value.split(",") if value else (), start=1):
        name, separator, content = part.partition("=")
        if not separator or not name.strip():  # not shown: headers hold secrets
            raise TelemetryInvalid(
                "OTEL_EXPORTER_OTLP_HEADERS", f"<entry {number}>", "must be name=value,..."
            )
        headers[unquote(name.strip()).lower()] = unquote(content.strip())
    return headers
