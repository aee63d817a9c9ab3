"""Errors of tracing. Does no I/O. None of them is raised while an update runs: only when a program
starts with telemetry that cannot work, or when someone asks for a round that is not there."""

from __future__ import annotations

from weightbus.schemas.errors import WeightBusError

__all__ = (
    "CollectorRefused",
    "ExporterMissing",
    "PrometheusMissing",
    "PrometheusUnavailable",
    "RoundUnknown",
    "TelemetryInvalid",
    "TracingError",
)


class TracingError(WeightBusError):
    """Base of the errors of tracing."""


class TelemetryInvalid(TracingError):
    """A setting of the telemetry export cannot be used."""

    def __init__(self, setting: str, value: str, limit: str) -> None:
        self.setting, self.value, self.limit = setting, value, limit
        super().__init__(f"{setting} is {value!r}: {limit}")


class ExporterMissing(TracingError):
    """Export was asked for, but the exporter of that protocol is not installed."""

    def __init__(self, protocol: str, endpoint: str) -> None:
        self.protocol, self.endpoint = protocol, endpoint
        super().__init__(
            f"spans cannot be sent to {endpoint}: no OTLP exporter for {protocol} is installed; "
            "pip install 'weightbus[otlp]'"
        )


class CollectorRefused(TracingError):
    """A collector did not take what was sent to it. Counted, and told once, at the end."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason or "it was not taken")


class PrometheusMissing(TracingError):
    """Prometheus is to read metrics, but what lets it is not installed."""

    def __init__(self, url: str) -> None:
        self.url = url
        super().__init__(
            f"metrics cannot be read at {url}: no exporter for Prometheus is installed; "
            "pip install 'weightbus[prometheus]'"
        )


class PrometheusUnavailable(TracingError):
    """Prometheus is to read metrics at an address that cannot be had."""

    def __init__(self, url: str, reason: str) -> None:
        self.url, self.reason = url, reason
        super().__init__(
            f"metrics cannot be read at {url}: {reason}; OTEL_EXPORTER_PROMETHEUS_HOST and "
            "OTEL_EXPORTER_PROMETHEUS_PORT must name an address of this host that no other process "
            "listens at"
        )


class RoundUnknown(TracingError):
    """The bus remembers no such round."""

    def __init__(self, wanted: str | None, model: str | None, recent: tuple[str, ...]) -> None:
        self.wanted, self.model, self.recent = wanted, model, recent
        asked = "any round" if wanted is None else f"round {wanted}"
        of_model = "" if model is None else f" of model {model}"
        known = "; recent rounds: " + ", ".join(recent) if recent else ""
        super().__init__(f"the bus does not remember {asked}{of_model}{known}")
