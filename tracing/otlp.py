"""Where spans and metrics are sent to, or read, if anywhere: settings, exporters, the losses.

Reads nothing by itself: `OtlpSettings.from_env` is given the environment by an entry point. The
exporters are the extra `otlp`; they are imported only when an endpoint is set. Where Prometheus
reads metrics is `weightbus.tracing.prometheus`.
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
    "PrometheusSettings",
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


METRICS_EXPORTERS: Final = ("otlp", "prometheus", "none")
"""What `OTEL_METRICS_EXPORTER` may name."""

MAX_PORT: Final = 65_535


class PrometheusSettings(Struct, frozen=True, kw_only=True):
    """Where Prometheus reads the metrics of this process, by HTTP at `/metrics`."""

    host: str = "localhost"
    """Address that is listened at; `0.0.0.0`: every one of this host. There is no access control:
    who reaches it reads the names of models and engines."""
    port: int = 9464
    """0: a free one, which is logged."""

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/metrics"

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> PrometheusSettings:
        """The standard variables `OTEL_EXPORTER_PROMETHEUS_HOST` and `_PORT`.

        Raises:
            TelemetryInvalid: the port is none.
        """
        host = environ.get("OTEL_EXPORTER_PROMETHEUS_HOST", "").strip()
        port = environ.get("OTEL_EXPORTER_PROMETHEUS_PORT", "").strip()
        default = cls()
        if port and not (port.isascii() and port.isdigit() and int(port) <= MAX_PORT):
            limit = f"must be a number from 0 to {MAX_PORT}"
            raise TelemetryInvalid("OTEL_EXPORTER_PROMETHEUS_PORT", port, limit)
        return cls(host=host or default.host, port=int(port) if port else default.port)


class OtlpSettings(Struct, frozen=True, kw_only=True):
    """One collector, or Prometheus, or both."""

    endpoint: str = ""
    """URL that spans are sent to: for HTTP the whole of it, `http://collector:4318/v1/traces`; for
    gRPC `http://collector:4317` (`https` for TLS). Empty: they are not sent."""
    protocol: OtlpProtocol = "http/protobuf"
    headers: Mapping[str, str] = {}
    """Sent with every request: authorisation of the collector, for example."""
    metrics_endpoint: str = ""
    """URL that metrics are sent to, by the same protocol and with the same headers: for HTTP
    `http://collector:4318/v1/metrics`. Empty: they are not sent."""
    prometheus: PrometheusSettings | None = None
    """None: metrics cannot be read there."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> OtlpSettings | None:
        """The standard variables `OTEL_EXPORTER_OTLP_[TRACES_]ENDPOINT`, `PROTOCOL`, `HEADERS`.

        Metrics are sent, too, where `OTEL_EXPORTER_OTLP_[METRICS_]ENDPOINT` says so, unless
        `OTEL_METRICS_EXPORTER` says otherwise: `none`, or `prometheus`, which lets Prometheus read
        them (`PrometheusSettings.from_env`); `otlp,prometheus` is both. None if there is nowhere
        to send anything to, or `OTEL_SDK_DISABLED` is true.

        Raises:
            TelemetryInvalid: a variable holds what cannot be used.
        """
        for_traces = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "").strip()
        for_metrics = environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "").strip()
        for_all = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()
        if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return None
        exporters = _metrics_exporters(environ)
        prometheus = PrometheusSettings.from_env(environ) if "prometheus" in exporters else None
        with_metrics = "otlp" in exporters
        if not (for_traces or for_all or (for_metrics and with_metrics)):
            return None if prometheus is None else cls(prometheus=prometheus)
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
            prometheus=prometheus,
        )


class ExportLosses(Struct, frozen=True, kw_only=True):
    """What never reached the collector, by cause: spans, and exports of metrics."""

    queue_full: int = 0
    """Spans that ended, or were to be made, while a queue was full or the telemetry closed."""
    refused: int = 0
    """Spans given up by the exporter (no connection, refused, no answer in time), rejected by the
    collector, or that could not be made."""
    unsent: int = 0
    """Spans still waiting, or on their way, when the deadline of the shutdown came."""
    metrics_refused: int = 0
    """Exports of metrics that the exporter gave up. The next one that arrives has all counts."""

    @property
    def total(self) -> int:
        """Of spans."""
        return self.queue_full + self.refused + self.unsent


def open_exporter(settings: OtlpSettings) -> SpanExporter:
    """The exporter of OpenTelemetry for these settings. It connects when it first exports.

    Raises:
        ExporterMissing: the extra `otlp` is not installed.
    """
    make = _module_of(settings, "trace_exporter").OTLPSpanExporter
    from weightbus.tracing import collectors  # the SDK takes long to import

    return (collectors.open_grpc if settings.protocol == "grpc" else collectors.open_http)(
        make,
        endpoint=settings.endpoint,
        headers=dict(settings.headers),
        timeout=EXPORT_TIMEOUT_S,
    )


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


def _metrics_exporters(environ: Mapping[str, str]) -> frozenset[str]:
    """
    Raises:
        TelemetryInvalid
    """
    value = environ.get("OTEL_METRICS_EXPORTER", "").strip().lower() or "otlp"
    named = frozenset(name.strip() for name in value.split(","))
    if not named <= set(METRICS_EXPORTERS) or ("none" in named and len(named) > 1):
        limit = f"must be one of {', '.join(METRICS_EXPORTERS)}, or otlp,prometheus"
        raise TelemetryInvalid("OTEL_METRICS_EXPORTER", value, limit)
    return named


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
