"""Prometheus reads the metrics of every service of a process at one address, by real HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import prometheus_client
import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.tracing.everything import measure_everything
from weightbus.schemas.progress import DeadLetter
from weightbus.tracing import metric_names
from weightbus.tracing.metric_names import BUS_METER, METRICS, PRODUCER_METER, prometheus_name
from weightbus.tracing.metrics import BusMetrics, PublisherMetrics
from weightbus.tracing.otlp import OtlpSettings, PrometheusSettings
from weightbus.tracing.telemetry import Telemetry, open_telemetry

TIMEOUT_S = 30.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def settings_of(port: int, host: str = "127.0.0.1") -> OtlpSettings:
    return OtlpSettings(prometheus=PrometheusSettings(host=host, port=port))


def get(url: str, **headers: str) -> tuple[str, str]:
    """Body and content type."""
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return answer.read().decode(), answer.headers["Content-Type"]


def scrape(port: int) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Name of the series -> labels, without those of the scope, and values."""
    body, _ = get(f"http://127.0.0.1:{port}/metrics")
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if not k.startswith("otel_scope")}
            found.setdefault(sample.name, []).append((labels, sample.value))
    return found


def publisher(telemetry: Telemetry, producer: str) -> PublisherMetrics:
    meter = telemetry.meter(PRODUCER_METER)
    return PublisherMetrics(meter, model="m", producer=producer, rank=0)


def test_figures_are_read_while_a_service_runs_and_not_after() -> None:
    port = free_port()
    with open_telemetry("trainer", otlp=settings_of(port)) as telemetry:
        metrics = publisher(telemetry, "t")
        metrics.published()
        metrics.blocked(0.02, 0.0)
        of = {
            "service_name": "trainer",
            "weightbus_model": "m",
            "weightbus_producer": "t",
            "weightbus_rank": "0",
        }
        found = scrape(port)
        assert found["weightbus_versions_published_total"] == [(of, 1.0)]
        assert found["weightbus_publish_blocked_seconds_count"] == [(of, 1.0)]
        assert [info["service_name"] for info, _ in found["target_info"]] == ["trainer"]
        metrics.published()
        assert scrape(port)["weightbus_versions_published_total"] == [(of, 2.0)]
    with pytest.raises(urllib.error.URLError):
        scrape(port)
    with open_telemetry("again", otlp=settings_of(port)):
        assert scrape(port)


def test_services_of_one_process_share_an_address_and_none_ends_it_for_the_others() -> None:
    port = free_port()
    with ExitStack() as stack:
        first = stack.enter_context(open_telemetry("trainer", otlp=settings_of(port)))
        with open_telemetry("consumer", otlp=settings_of(port)) as second:
            publisher(first, "t").published()
            publisher(second, "u").published()
            found = scrape(port)["weightbus_versions_published_total"]
            told = {(of["service_name"], of["weightbus_producer"]): value for of, value in found}
            assert told == {("trainer", "t"): 1.0, ("consumer", "u"): 1.0}
            body, _ = get(f"http://127.0.0.1:{port}/metrics")
            assert body.count("# TYPE weightbus_versions_published_total ") == 1
        found = scrape(port)["weightbus_versions_published_total"]
        assert [of["weightbus_producer"] for of, _ in found] == ["t"]


def test_counts_add_up_when_two_services_say_the_same_of_themselves() -> None:
    port = free_port()
    with (
        open_telemetry("trainer", otlp=settings_of(port)) as first,
        open_telemetry("trainer", otlp=settings_of(port)) as second,
    ):
        for telemetry, size_bytes in ((first, 100), (second, 300)):
            metrics = publisher(telemetry, "t")
            metrics.published()
            metrics.blocked(1.0, 0.5)
            metrics.slots({"host": size_bytes})
        found = scrape(port)
        assert [v for _, v in found["weightbus_versions_published_total"]] == [2.0]
        assert [v for _, v in found["weightbus_publish_blocked_seconds_sum"]] == [2.0]
        assert [v for _, v in found["weightbus_slot_size_bytes"]] == [300.0]


def test_telemetry_goes_on_and_warns_once_when_the_port_is_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with _telemetry(port) as telemetry:
            assert telemetry.metrics_url == ""
            publisher(telemetry, "t").published()
    (record,) = caplog.records
    told = record.getMessage()
    assert record.levelname == "WARNING"
    assert f"metrics cannot be read at http://127.0.0.1:{port}/metrics: Address already in " in told
    assert "OTEL_EXPORTER_PROMETHEUS_PORT must name" in told
    with _telemetry(port):
        assert scrape(port), "an address that could not be had is tried again"


def _telemetry(port: int) -> Any:
    return open_telemetry("x", otlp=settings_of(port))


def test_warning_names_the_address_when_the_host_is_not_this_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = settings_of(free_port(), host="192.0.2.1")  # RFC 5737: nobody has it
    with open_telemetry("x", otlp=settings):
        pass
    assert "metrics cannot be read at http://192.0.2.1:" in caplog.text


def test_free_port_is_taken_and_told_when_it_is_0(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "weightbus.tracing.prometheus")
    with open_telemetry("x", otlp=settings_of(0)):
        (told,) = [r.getMessage() for r in caplog.records if "Prometheus" in r.getMessage()]
        body, content_type = get(told.rpartition(" ")[2])
    assert "target_info" in body
    assert content_type.startswith("text/plain")


def test_open_metrics_are_valid_and_other_paths_are_not_found() -> None:
    port = free_port()
    with (
        open_telemetry("x", otlp=settings_of(port)) as first,
        open_telemetry("y", otlp=settings_of(port)) as second,
    ):
        measure_everything(first, engine="a")
        measure_everything(second, engine="b")
        url = f"http://127.0.0.1:{port}/metrics"
        body, content_type = get(url, Accept="application/openmetrics-text; version=1.0.0")
        assert content_type.startswith("application/openmetrics-text")
        read: Any = openmetrics.text_string_to_metric_families  # it refuses what is not in order
        families = {each.name for each in read(body)}
        assert families >= {prometheus_name(spec).removesuffix("_total") for spec in METRICS}
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(f"http://127.0.0.1:{port}/")
        assert caught.value.code == 404


def test_the_global_registry_of_the_client_library_is_left_alone() -> None:
    port = free_port()
    prometheus_client.REGISTRY.get_sample_value("python_info")
    with open_telemetry("x", otlp=settings_of(port)) as telemetry:
        publisher(telemetry, "t").published()
        assert "weightbus" not in prometheus_client.generate_latest().decode()
        assert "python_info" not in get(f"http://127.0.0.1:{port}/metrics")[0]


def test_every_scrape_is_whole_when_many_come_at_once() -> None:
    port = free_port()
    counts: list[int] = []

    def look() -> None:
        counts.extend(len(scrape(port)["weightbus_versions_published_total"]) for _ in range(5))

    with (
        open_telemetry("a", otlp=settings_of(port)) as first,
        open_telemetry("b", otlp=settings_of(port)) as second,
    ):
        publisher(first, "t").published()
        publisher(second, "u").published()
        threads = [threading.Thread(target=look) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert counts == [2] * 20


def test_fork_keeps_no_address_and_ends_nothing() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with open_telemetry("trainer", otlp=settings_of(0)) as telemetry:
            publisher(telemetry, "t").published()
            child = os.fork()
            if child == 0:
                ours.close()
                theirs.send(b"x")
                theirs.recv(1)  # it outlives the telemetry
                os._exit(0)
            theirs.close()
            ours.settimeout(TIMEOUT_S)
            assert ours.recv(1), "it runs, and so has forgotten what it inherited"
            port = urlsplit(telemetry.metrics_url).port
            assert port
            assert scrape(port)["weightbus_versions_published_total"]
        with socket.create_server(("127.0.0.1", port)):
            """The address is free, though the fork lives."""
    assert os.waitpid(child, 0) == (child, 0)


def test_telemetry_names_the_extra_when_the_exporter_is_not_installed() -> None:
    program = """
import sys
sys.modules["opentelemetry.exporter"] = None  # what the import system keeps for "not there"
from weightbus.tracing.errors import PrometheusMissing
from weightbus.tracing.otlp import OtlpSettings, PrometheusSettings
from weightbus.tracing.telemetry import open_telemetry
try:
    with open_telemetry("x", otlp=OtlpSettings(prometheus=PrometheusSettings())):
        pass
except PrometheusMissing as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert "http://localhost:9464/metrics" in done.stdout
    assert "pip install 'weightbus[prometheus]'" in done.stdout


def test_names_are_those_that_prometheus_sees() -> None:
    """Of a counter, an observed one, a histogram, a gauge and a count of what is the case."""
    port = free_port()
    with open_telemetry("x", otlp=settings_of(port)) as telemetry:
        metrics = publisher(telemetry, "t")
        metrics.published()
        metrics.skipped("busy")
        metrics.blocked(1.0, 1.0)
        metrics.slots({"host": 1})
        bus = BusMetrics(telemetry.meter(BUS_METER), model="m", reporter="r")
        bus.dead_letter(DeadLetter(model="other", subject="s", reason="r"))
        found = scrape(port)
    specs = [spec for spec in METRICS if spec.meter != metric_names.CONSUMER_METER]
    for spec in specs:
        name = prometheus_name(spec) + ("_count" if spec.kind == "histogram" else "")
        (labels, _), *_ = found.pop(name)
        assert set(labels) - {"service_name"} == {a.replace(".", "_") for a in spec.attributes}
    rest = {name.removesuffix("_bucket").removesuffix("_sum") for name in found}
    histograms = {prometheus_name(spec) for spec in specs if spec.kind == "histogram"}
    assert rest == {"target_info", *histograms}
