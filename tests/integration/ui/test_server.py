"""What the page's server answers, to whom, and how it ends; no browser is needed."""

from __future__ import annotations

import socket
import subprocess
from urllib.parse import urlsplit

import anyio.to_thread
import httpx
import msgspec
import pytest

from tests.integration.tracing.monitors import weightbus
from tests.integration.ui.pages import open_ui, put
from tests.nats_server import NatsServer
from tests.unit.tracing.rounds import (
    MODEL,
    complete,
    done,
    join,
    plan,
    ready,
    route,
    stage,
    state,
    whole_round,
)
from weightbus.bus.connection import Bus
from weightbus.cli.ui.guard import HEADERS
from weightbus.cli.ui.stream import STREAMS_MAX
from weightbus.tracing.exports.html import SCRIPTS
from weightbus.tracing.waterfall import Waterfall

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

PATHS = ("/", "/ui.js", "/ui.css", "/waterfall.css", "/icon.svg", *(f"/{name}" for name in SCRIPTS))


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
async def test_server_refuses_whoever_asks_for_it_by_another_name(ui_url: str, host: str) -> None:
    async with httpx.AsyncClient(base_url=ui_url) as client:
        for path in ("/", "/api/events", f"/api/rounds/{MODEL}/v7"):
            answer = await client.get(path, headers={"Host": host})
            assert answer.status_code in (400, 421), path
            assert MODEL not in answer.text


@pytest.mark.parametrize(
    "host", ["127.0.0.1:1", "localhost", "LOCALHOST:99", "[::1]:80", "10.0.0.1"]
)
async def test_server_answers_to_addresses_and_localhost_whatever_the_port(
    ui_url: str, host: str
) -> None:
    async with httpx.AsyncClient(base_url=ui_url) as client:
        assert (await client.get("/", headers={"Host": host})).status_code == 200


async def test_every_answer_carries_the_policy_and_only_reading_is_possible(ui_url: str) -> None:
    async with httpx.AsyncClient(base_url=ui_url) as client:
        for path in (*PATHS, "/nothing", f"/api/rounds/{MODEL}/v7"):
            answer = await client.get(path)
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS, path
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert (await client.request(method, "/")).status_code == 405
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


async def test_waterfall_is_the_same_as_that_of_weightbus_trace(
    nats_server: NatsServer, teller: Bus, ui_url: str
) -> None:
    await put(teller, *whole_round())

    def trace() -> subprocess.CompletedProcess[str]:
        return weightbus("trace", "--json", "v7", "--nats", nats_server.url)

    told = await anyio.to_thread.run_sync(trace)
    async with httpx.AsyncClient(base_url=ui_url) as client:
        answer = await client.get(f"/api/rounds/{MODEL}/v7")
        assert (await client.get(f"/api/rounds/{MODEL}/v9")).status_code == 404
        assert (await client.get(f"/api/rounds/{MODEL}/v7/tape")).status_code == 404
        assert (await client.get("/api/rounds/no$model/v7")).status_code == 400
    read = msgspec.json.decode(answer.content, type=Waterfall)
    assert read == msgspec.json.decode(told.stdout, type=Waterfall)


async def test_round_is_told_with_its_buckets_once_it_has_ended(teller: Bus, ui_url: str) -> None:
    """While it runs it is asked for twice a second, and they are most of it."""
    stream = await open_stream(ui_url)
    fetch = stage(
        "a", "fetch", 10, 40, rank=0, taken="local", moved_bytes=200,
        buckets_ms=[(10, 25), (25, 40)],
    )  # fmt: skip
    async with httpx.AsyncClient(base_url=ui_url) as client:

        async def buckets(path: str = "") -> int:
            answer = await client.get(f"/api/rounds/{MODEL}/v7{path}")
            told = msgspec.json.decode(answer.content, type=Waterfall)
            return sum(len(row.buckets) for engine in told.engines for row in engine.stages)

        await put(teller, ready(), join("a"), plan(route("a")), fetch)
        await read_until(stream, b'"last_stage":"a/0 fetch"')
        assert (await buckets(), await buckets("/json")) == (0, 2)
        await put(teller, complete("a"), done("a"))
        await read_until(stream, b'"rounds":[]')
        assert await buckets() == 2
    stream.close()


async def test_pages_beyond_the_limit_are_refused_and_the_others_served(
    teller: Bus, ui_url: str
) -> None:
    held = [await open_stream(ui_url) for _ in range(STREAMS_MAX)]
    try:
        async with httpx.AsyncClient(base_url=ui_url) as client:
            assert (await client.get("/api/events")).status_code == 503
        await put(teller, state("newcomer"))
        for stream in held:
            await read_until(stream, b"newcomer")
    finally:
        for stream in held:
            stream.close()


async def open_stream(url: str) -> socket.socket:
    """A page's stream, as its bytes."""
    address = urlsplit(url)

    def connect() -> socket.socket:
        stream = socket.create_connection((str(address.hostname), address.port or 0), timeout=60)
        stream.sendall(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return stream

    stream = await anyio.to_thread.run_sync(connect)
    await read_until(stream, b'"whole":true')
    return stream


async def read_until(stream: socket.socket, wanted: bytes) -> None:
    def read() -> None:
        seen = b""
        while wanted not in seen:
            part = stream.recv(65_536)
            assert part, f"it ended without {wanted!r}: {seen[-200:]!r}"
            seen += part

    await anyio.to_thread.run_sync(read)


def test_command_fails_with_one_line_when_there_is_no_bus_or_the_port_is_taken(
    nats_server: NatsServer,
) -> None:
    port = nats_server.url.rpartition(":")[2]
    taken = weightbus("ui", "--nats", nats_server.url, "--port", port)
    assert taken.returncode == 1
    assert f"cannot be served at 127.0.0.1 port {port}" in taken.stderr
    assert "give another --port" in taken.stderr
    elsewhere = weightbus("ui", "--nats", nats_server.url, "--host", "192.0.2.1")
    assert elsewhere.returncode == 1
    assert elsewhere.stderr.endswith("--host must be an address of this machine\n")
    nats_server.stop()
    quick = {"WEIGHTBUS_CONNECT_TIMEOUT_S": "0.5"}
    gone = weightbus("ui", "--nats", nats_server.url, "--port", "0", **quick)
    assert gone.returncode == 1
    for ended in (taken, gone):
        assert len(ended.stderr.splitlines()) == 1, ended.stderr


async def test_command_ends_at_once_while_pages_are_open(nats_server: NatsServer) -> None:
    async with open_ui(nats_server.url) as url:
        stream = await open_stream(url)
    rest = await anyio.to_thread.run_sync(stream.recv, 65_536)
    assert rest in (b"", b"0\r\n\r\n") or b"data:" in rest
    stream.close()
