"""Errors of tracing. Does no I/O. None of them is raised while an update runs: only when a program
starts with telemetry that cannot work, or when someone asks for a round that is not there."""

from __future__ import annotations

from weightbus.schemas.errors import WeightBusError

__all__ = (
    "ExporterMissing",
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
            "pip install weightbus[otlp]"
        )


class RoundUnknown(TracingError):
    """The bus remembers no such round."""

    def __init__(self, wanted: str | None, model: str | None, recent: tuple[str, ...]) -> None:
        self.wanted, self.model, self.recent = wanted, model, recent
        asked = "any round" if wanted is None else f"round {wanted}"
        of_model = "" if model is None else f" of model {model}"
        known = "; recent rounds: " + ", ".join(recent) if recent else ""
        super().__init__(f"the bus does not remember {asked}{of_model}{known}")
