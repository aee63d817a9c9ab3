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
Signal = Literal["TRACES", "METRICS"]
"""As the standard variables call it."""

EXPORT_TIMEOUT_S: Final = 5
"""How long one batch may take, retries included, before it is given up."""

_EXPORTER_PACKAGES: Final[Mapping[OtlpProtocol, str]] = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc",
}


EXPORTERS: Final[Mapping[Signal, tuple[str, ...]]] = {
    "TRACES": ("otlp", "none"),
    "METRICS": ("otlp", "prometheus", "none"),
}
"""What `OTEL_<signal>_EXPORTER` may name."""

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
    """Of spans."""
    headers: Mapping[str, str] = {}
    """Sent with every request of spans: authorisation of the collector, for example."""
    metrics_endpoint: str = ""
    """URL that metrics are sent to: for HTTP `http://collector:4318/v1/metrics`. Empty: they are
    not sent."""
    metrics_protocol: OtlpProtocol = "http/protobuf"
    metrics_headers: Mapping[str, str] = {}
    """Sent with every request of metrics."""
    prometheus: PrometheusSettings | None = None
    """None: metrics cannot be read there."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> OtlpSettings | None:
        """The standard variables `OTEL_EXPORTER_OTLP_ENDPOINT`, `PROTOCOL`, `HEADERS`.

        Each of them for spans alone, too, or for metrics alone (`OTEL_EXPORTER_OTLP_TRACES_...`,
        `OTEL_EXPORTER_OTLP_METRICS_...`), which then counts for these. `OTEL_TRACES_EXPORTER` and
        `OTEL_METRICS_EXPORTER` may be `none`; the latter `prometheus`, too, which lets Prometheus
        read them (`PrometheusSettings.from_env`); `otlp,prometheus` is both. None if there is
        nowhere to send anything to, or `OTEL_SDK_DISABLED` is true.

        Raises:
            TelemetryInvalid: a variable holds what cannot be used.
        """
        if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return None
        spans = _Destination.from_env(environ, "TRACES")
        metrics = _Destination.from_env(environ, "METRICS")
        with_prometheus = "prometheus" in _exporters(environ, "METRICS")
        prometheus = PrometheusSettings.from_env(environ) if with_prometheus else None
        if not (spans.endpoint or metrics.endpoint or prometheus):
            return None
        return cls(
            endpoint=spans.endpoint,
            protocol=spans.protocol,
            headers=spans.headers,
            metrics_endpoint=metrics.endpoint,
            metrics_protocol=metrics.protocol,
            metrics_headers=metrics.headers,
            prometheus=prometheus,
        )


class _Destination(Struct, frozen=True):
    """Where one signal goes to."""

    endpoint: str = ""
    protocol: OtlpProtocol = "http/protobuf"
    headers: Mapping[str, str] = {}

    @classmethod
    def from_env(cls, environ: Mapping[str, str], signal: Signal) -> _Destination:
        """
        Raises:
            TelemetryInvalid
        """
        own, own_name = _variable(environ, f"{signal}_ENDPOINT")
        for_all, name_for_all = _variable(environ, "ENDPOINT")
        if "otlp" not in _exporters(environ, signal) or not (own or for_all):
            return cls()
        protocol = _protocol(*_variable(environ, f"{signal}_PROTOCOL", "PROTOCOL"))
        endpoint = own or _with_path(for_all, f"/v1/{signal.lower()}", protocol)
        _check_url(own_name if own else name_for_all, endpoint)
        headers = _headers(*_variable(environ, f"{signal}_HEADERS", "HEADERS"))
        return cls(endpoint, protocol, headers)


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
    make = _module_of(settings.protocol, "trace_exporter", settings.endpoint).OTLPSpanExporter
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
    endpoint = settings.metrics_endpoint
    exporter = _module_of(
        settings.metrics_protocol, "metric_exporter", endpoint
    ).OTLPMetricExporter(
        endpoint=endpoint,
        headers=dict(settings.metrics_headers),
        timeout=EXPORT_TIMEOUT_S,
    )
    return cast("MetricExporter", exporter)


def _module_of(protocol: OtlpProtocol, name: str, endpoint: str) -> Any:
    try:
        return import_module(f"{_EXPORTER_PACKAGES[protocol]}.{name}")
    except ImportError as error:
        raise ExporterMissing(protocol, endpoint) from error


def _exporters(environ: Mapping[str, str], signal: Signal) -> frozenset[str]:
    """
    Raises:
        TelemetryInvalid
    """
    variable, known = f"OTEL_{signal}_EXPORTER", EXPORTERS[signal]
    value = environ.get(variable, "").strip().lower() or "otlp"
    named = frozenset(name.strip() for name in value.split(","))
    if not named <= set(known) or ("none" in named and len(named) > 1):
        both = ", or otlp,prometheus" if "prometheus" in known else ""
        raise TelemetryInvalid(variable, value, f"must be one of {', '.join(known)}{both}")
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


def _variable(environ: Mapping[str, str], *names: str) -> tuple[str, str]:
    """The value of the first that is set, and what that is called."""
    for name in names:
        if value := environ.get(f"OTEL_EXPORTER_OTLP_{name}", "").strip():
            return value, f"OTEL_EXPORTER_OTLP_{name}"
    return "", f"OTEL_EXPORTER_OTLP_{names[-1]}"


def _protocol(value: str, variable: str) -> OtlpProtocol:
    if not value:
        return "http/protobuf"
    for protocol in get_args(OtlpProtocol):
        if value == protocol:
            return cast("OtlpProtocol", protocol)
    raise TelemetryInvalid(variable, value, f"must be one of {', '.join(get_args(OtlpProtocol))}")


def _headers(value: str, variable: str) -> dict[str, str]:
    """`name=value,name=value`, percent-encoded; names in lower case, as gRPC demands."""
    headers = {}
    for number, part in enumerate(value.split(",") if value else (), start=1):
        name, separator, content = part.partition("=")
        if not separator or not name.strip():  # not shown: headers hold secrets
            raise TelemetryInvalid(variable, f"<entry {number}>", "must be name=value,...")
        headers[unquote(name.strip()).lower()] = unquote(content.strip())
    return headers
