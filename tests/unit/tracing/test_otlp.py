"""The standard variables of OTLP are read as its specification says; a missing extra is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from msgspec import structs

from weightbus.tracing.errors import TelemetryInvalid
from weightbus.tracing.otlp import OtlpSettings, PrometheusSettings

PREFIX = "OTEL_EXPORTER_OTLP_"


HTTP = OtlpSettings(endpoint="http://c/v1/traces", metrics_endpoint="http://c/v1/metrics")
GRPC = OtlpSettings(
    endpoint="http://c:4317",
    protocol="grpc",
    metrics_endpoint="http://c:4317",
    metrics_protocol="grpc",
)
SECRET = {"authorization": "Bearer x=", "tenant": "a"}


@pytest.mark.parametrize(("environ", "expected"), [
    ({}, None),
    ({"ENDPOINT": ""}, None),
    ({"ENDPOINT": "http://c"}, HTTP),
    ({"METRICS_ENDPOINT": "http://c/v1/metrics"}, structs.replace(HTTP, endpoint="")),
    (
        {"METRICS_ENDPOINT": "http://c:4317", "PROTOCOL": "grpc"},
        OtlpSettings(metrics_endpoint="http://c:4317", metrics_protocol="grpc"),
    ),
    (
        {"ENDPOINT": "http://c:4318/otel/"},
        OtlpSettings(
            endpoint="http://c:4318/otel/v1/traces",
            metrics_endpoint="http://c:4318/otel/v1/metrics",
        ),
    ),
    ({"TRACES_ENDPOINT": "http://c/in"}, OtlpSettings(endpoint="http://c/in")),
    (
        {"TRACES_ENDPOINT": "http://c/in", "METRICS_ENDPOINT": "http://m/in"},
        OtlpSettings(endpoint="http://c/in", metrics_endpoint="http://m/in"),
    ),
    (
        {"ENDPOINT": "http://c", "TRACES_ENDPOINT": "https://t/v1/traces"},
        structs.replace(HTTP, endpoint="https://t/v1/traces"),
    ),
    ({"ENDPOINT": "http://c:4317", "PROTOCOL": "grpc"}, GRPC),
    (
        {"ENDPOINT": "http://c:4317", "PROTOCOL": "http/protobuf", "TRACES_PROTOCOL": "grpc"},
        OtlpSettings(
            endpoint="http://c:4317",
            protocol="grpc",
            metrics_endpoint="http://c:4317/v1/metrics",
        ),
    ),
    (
        {"ENDPOINT": "http://c", "METRICS_PROTOCOL": "grpc"},
        structs.replace(HTTP, metrics_endpoint="http://c", metrics_protocol="grpc"),
    ),
    (
        {"ENDPOINT": "http://c", "HEADERS": "Authorization=Bearer%20x=, tenant = a "},
        structs.replace(HTTP, headers=SECRET, metrics_headers=SECRET),
    ),
    (
        {"ENDPOINT": "http://c", "TRACES_HEADERS": "authorization=Bearer%20x=,tenant=a"},
        structs.replace(HTTP, headers=SECRET),
    ),
    (
        {"ENDPOINT": "http://c", "HEADERS": "tenant=b", "METRICS_HEADERS": "tenant=m"},
        structs.replace(HTTP, headers={"tenant": "b"}, metrics_headers={"tenant": "m"}),
    ),
])  # fmt: skip
def test_settings_follow_the_standard_variables(
    environ: dict[str, str], expected: OtlpSettings | None
) -> None:
    assert (
        OtlpSettings.from_env({PREFIX + key: value for key, value in environ.items()}) == expected
    )


def test_metrics_are_not_sent_when_their_exporter_is_none() -> None:
    environ = {PREFIX + "ENDPOINT": "http://c", "OTEL_METRICS_EXPORTER": "none"}
    assert OtlpSettings.from_env(environ) == structs.replace(HTTP, metrics_endpoint="")
    environ = {PREFIX + "METRICS_ENDPOINT": "http://c", "OTEL_METRICS_EXPORTER": "none"}
    assert OtlpSettings.from_env(environ) is None


def test_spans_are_not_sent_when_their_exporter_is_none() -> None:
    environ = {PREFIX + "ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}
    assert OtlpSettings.from_env(environ) == structs.replace(HTTP, endpoint="")
    assert OtlpSettings.from_env(environ | {"OTEL_METRICS_EXPORTER": "none"}) is None


@pytest.mark.parametrize(("environ", "expected"), [
    ({"METRICS_EXPORTER": "prometheus"}, OtlpSettings(prometheus=PrometheusSettings())),
    (
        {
            "METRICS_EXPORTER": "prometheus",
            "EXPORTER_PROMETHEUS_HOST": "0.0.0.0",
            "EXPORTER_PROMETHEUS_PORT": "9500",
        },
        OtlpSettings(prometheus=PrometheusSettings(host="0.0.0.0", port=9500)),
    ),
    (
        {"METRICS_EXPORTER": "prometheus", "EXPORTER_OTLP_ENDPOINT": "http://c"},
        structs.replace(HTTP, metrics_endpoint="", prometheus=PrometheusSettings()),
    ),
    (
        {"METRICS_EXPORTER": "otlp, Prometheus", "EXPORTER_OTLP_ENDPOINT": "http://c"},
        structs.replace(HTTP, prometheus=PrometheusSettings()),
    ),
    (
        {"METRICS_EXPORTER": "otlp", "EXPORTER_PROMETHEUS_PORT": "x"}, None
    ),
    ({"METRICS_EXPORTER": "prometheus", "SDK_DISABLED": "true"}, None),
])  # fmt: skip
def test_prometheus_reads_metrics_when_the_standard_variables_say_so(
    environ: dict[str, str], expected: OtlpSettings | None
) -> None:
    named = {f"OTEL_{key}": value for key, value in environ.items()}
    assert OtlpSettings.from_env(named) == expected


@pytest.mark.parametrize(("environ", "told"), [
    ({"METRICS_EXPORTER": "console"}, "OTEL_METRICS_EXPORTER is 'console': must be one of otlp, "),
    ({"TRACES_EXPORTER": "jaeger"}, "OTEL_TRACES_EXPORTER is 'jaeger': must be one of otlp, none"),
    ({"METRICS_EXPORTER": "none,otlp"}, "OTEL_METRICS_EXPORTER is 'none,otlp': must be one of"),
    (
        {"METRICS_EXPORTER": "prometheus", "EXPORTER_PROMETHEUS_PORT": "65536"},
        "OTEL_EXPORTER_PROMETHEUS_PORT is '65536': must be a number from 0 to 65535",
    ),
    (
        {"METRICS_EXPORTER": "prometheus", "EXPORTER_PROMETHEUS_PORT": "-1"},
        "OTEL_EXPORTER_PROMETHEUS_PORT is '-1': must be",
    ),
])  # fmt: skip
def test_exporters_of_metrics_are_refused_by_name_when_they_cannot_be_used(
    environ: dict[str, str], told: str
) -> None:
    with pytest.raises(TelemetryInvalid, match=re.escape(told)):
        OtlpSettings.from_env({f"OTEL_{key}": value for key, value in environ.items()})


def test_settings_are_none_when_the_sdk_is_disabled() -> None:
    environ = {PREFIX + "ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "TRUE"}
    assert OtlpSettings.from_env(environ) is None


@pytest.mark.parametrize(("variable", "value", "setting"), [
    ("ENDPOINT", "collector:4318", "OTEL_EXPORTER_OTLP_ENDPOINT"),
    ("METRICS_ENDPOINT", "collector:4318", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"),
    ("PROTOCOL", "http/json", "OTEL_EXPORTER_OTLP_PROTOCOL"),
    ("METRICS_PROTOCOL", "http/json", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL"),
    ("HEADERS", "tenant=a,secret", "OTEL_EXPORTER_OTLP_HEADERS"),
    ("TRACES_HEADERS", "tenant=a,secret", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"),
])  # fmt: skip
def test_settings_are_refused_by_name_when_a_variable_cannot_be_used(
    variable: str, value: str, setting: str
) -> None:
    environ = {PREFIX + "ENDPOINT": "http://c:4318", PREFIX + variable: value}
    with pytest.raises(TelemetryInvalid, match=setting) as caught:
        OtlpSettings.from_env(environ)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_telemetry_names_the_extra_when_the_exporter_is_not_installed(protocol: str) -> None:
    program = f"""
import sys
sys.modules["opentelemetry.exporter"] = None  # what the import system keeps for "not there"
from weightbus.tracing.errors import ExporterMissing
from weightbus.tracing.otlp import OtlpSettings
from weightbus.tracing.telemetry import open_telemetry
try:
    with open_telemetry("x", otlp=OtlpSettings(endpoint="http://c:1", protocol={protocol!r})):
        pass
except ExporterMissing as error:
    print(error)
"""
    assert "pip install 'weightbus[otlp]'" in _run(program)


def test_telemetry_imports_neither_sdk_nor_exporter_when_nothing_is_exported() -> None:
    program = """
import sys
from weightbus.tracing.telemetry import open_telemetry
with open_telemetry("x") as telemetry, telemetry.span("y"):
    pass
heavy = ("opentelemetry.sdk", "opentelemetry.exporter", "grpc", "requests", "rich", "torch")
print([name for name in heavy if name in sys.modules])
"""
    assert _run(program).strip() == "[]"


def test_ids_are_valid_when_the_sdk_is_disabled_but_an_exporter_is_given() -> None:
    program = """
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from weightbus.tracing.telemetry import open_telemetry
exporter = InMemorySpanExporter()
with open_telemetry("x", exporter=exporter) as telemetry, telemetry.span("a") as a:
    with telemetry.span("b", parent=a.ref) as b:
        pass
assert a.ref.trace_id == b.ref.trace_id != "0" * 32, (a.ref, b.ref)
assert a.ref.span_id != b.ref.span_id, (a.ref, b.ref)
print(exporter.get_finished_spans())
"""
    assert _run(program, OTEL_SDK_DISABLED="true").strip() == "()"


def _run(program: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
