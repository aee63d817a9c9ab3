"""Where Prometheus reads the metrics of this process: one HTTP server for each address.

Owns the servers of this process: several services (publishers, consumers) that name the same
address share one, and what they have is merged; the last of them ends it. Needs the extra
`prometheus`. Invariants: nothing goes through the client library's global registry; a scrape
touches no bus and no engine; a fork keeps no address.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, Final

from msgspec import structs
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.resources import SERVICE_NAME
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric, Sample
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from weightbus.tracing.errors import PrometheusUnavailable
from weightbus.tracing.otlp import PrometheusSettings

__all__ = ("OwnEndpoint", "open_endpoint")

_logger = logging.getLogger(__name__)

REQUEST_S: Final = 10.0
"""How long a client may take to say what it wants."""

POLL_S: Final = 0.1
"""How often the server looks whether it is to end."""

STOP_S: Final = 1.0


class _Registry(CollectorRegistry):
    """What several services have, as one."""

    def __init__(self) -> None:
        super().__init__(auto_describe=False)
        self._sources: list[Collector] = []
        self._lock = threading.Lock()

    def register(self, collector: Collector) -> None:
        with self._lock:
            self._sources.append(collector)

    def unregister(self, collector: Collector) -> None:
        with self._lock:
            self._sources = [source for source in self._sources if source is not collector]

    def collect(self) -> Iterator[Metric]:
        """Every metric once, with the samples of all services."""
        with self._lock:  # a reader of OpenTelemetry is asked by one thread at a time
            merged = _merged(metric for source in self._sources for metric in source.collect())
        yield from merged


def _merged(metrics: Iterable[Metric]) -> list[Metric]:
    """Metrics of one name become one; samples of the same labels add up, but for gauges, whose last
    counts."""
    families: dict[str, Metric] = {}
    for metric in metrics:
        known = families.get(metric.name)
        if known is None:
            families[metric.name] = metric
        else:
            known.samples = _added(known, metric.samples)
    return list(families.values())


def _added(metric: Metric, more: list[Sample]) -> list[Sample]:
    samples: dict[tuple[str, frozenset[tuple[str, str]]], Sample] = {}
    for sample in (*metric.samples, *more):
        key = sample.name, frozenset(sample.labels.items())
        if key in samples and metric.type in ("counter", "histogram"):
            sample = sample._replace(value=samples[key].value + sample.value)
        samples[key] = sample
    return list(samples.values())


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, settings: PrometheusSettings, registry: _Registry) -> None:
        found = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        self.address_family, *_, address = found[0]
        self.registry = registry
        super().__init__((str(address[0]), settings.port), _Handler)

    def server_bind(self) -> None:
        """Without asking the DNS for a name, as its base does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no matter."""
        _logger.debug("a scrape by %s failed", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_S
    server: _Server

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND, "metrics are at /metrics")
            return
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        body = encode(self.server.registry)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Shared:
    """One server, and how many services use it."""

    def __init__(self, settings: PrometheusSettings) -> None:
        self.registry = _Registry()
        self.users = 0
        self._server = _Server(settings, self.registry)
        self.url = structs.replace(settings, port=self._server.server_port).url
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            args=(POLL_S,),
            name="weightbus-prometheus",
            daemon=True,
        )
        self._thread.start()
        _logger.info("Prometheus reads metrics at %s", self.url)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(STOP_S)
        self._server.server_close()

    def forget(self) -> None:
        """In a fork, which has the socket and not the thread."""
        self._server.socket.close()


_servers: dict[PrometheusSettings, _Shared] = {}
_lock = threading.Lock()


class OwnEndpoint:
    """One service's part of an address where Prometheus reads."""

    def __init__(self, settings: PrometheusSettings, shared: _Shared) -> None:
        self._settings, self._shared, self._process = settings, shared, os.getpid()
        self._is_open = True
        self.reader = PrometheusMetricReader(
            registry=shared.registry,
            resource_attribute_filter=lambda key: key == SERVICE_NAME,
        )
        """For the service's meter provider."""
        self.url = shared.url

    def close(self) -> None:
        """Take the service's figures away, and end the server if nobody else uses it. Idempotent;
        nothing in a fork."""
        with _lock:
            if not self._is_open or os.getpid() != self._process:
                return
            self._is_open = False
            self._shared.registry.unregister(self.reader._collector)
            self._shared.users -= 1
            if self._shared.users:
                return
            del _servers[self._settings]
        self._shared.close()


def open_endpoint(settings: PrometheusSettings) -> OwnEndpoint:
    """Let Prometheus read what the endpoint's `reader` has; listening once this returns.

    Raises:
        PrometheusUnavailable: the address is another process's, or not of this host.
    """
    with _lock:
        shared = _servers.get(settings)
        if shared is None:
            try:
                shared = _servers[settings] = _Shared(settings)
            except OSError as error:
                reason = str(error.strerror or error)
                raise PrometheusUnavailable(settings.url, reason) from error
        shared.users += 1
        return OwnEndpoint(settings, shared)


def _forget_servers() -> None:
    global _lock
    _lock = threading.Lock()
    for shared in _servers.values():
        shared.forget()
    _servers.clear()


os.register_at_fork(after_in_child=_forget_servers)
