"""The client of engines' HTTP servers: what is made of answers, and of none."""

from __future__ import annotations

from collections.abc import Callable, Coroutine

import anyio
import httpx
import pytest

from weightbus.consumers.engines.http import HttpRefused, JsonServer, open_json_server
from weightbus.consumers.errors import DeadlineExceeded, EngineUnavailable, cause_of

pytestmark = pytest.mark.anyio

URL = "http://127.0.0.1:1"
LONG_S = 30.0

Handler = Callable[[httpx.Request], Coroutine[None, None, httpx.Response]]


async def ask(handle: Handler, deadline_s: float = LONG_S, key: str = "") -> dict[str, object]:
    transport = httpx.MockTransport(handle)
    async with httpx.AsyncClient(base_url=URL, transport=transport, timeout=None) as client:
        server = JsonServer(URL, client)
        return await server.ask(
            "POST", "/do", deadline_s, query={"tags": ["a", "b"]}, body={"n": 1}, key=key
        )


async def test_answer_is_its_json_object_and_the_request_is_as_it_was_told() -> None:
    async def handle(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == f"{URL}/do?tags=a&tags=b"
        assert request.read() == b'{"n":1}'
        assert request.headers["Authorization"] == "Bearer secret"
        return httpx.Response(200, json={"done": True})

    assert await ask(handle, key="secret") == {"done": True}


@pytest.mark.parametrize("content", [b"", b"Cache flushed.\n", b"[1]"])
async def test_answer_is_empty_when_it_is_no_json_object(content: bytes) -> None:
    async def handle(request: httpx.Request) -> httpx.Response:
        assert "Authorization" not in request.headers
        return httpx.Response(200, content=content)

    assert await ask(handle) == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"error": {"message": "not\\n now"}}', "not now"),
        (b'{"success": false, "message": "busy"}', "busy"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"Flush cache failed.\n", "Flush cache failed."),
        (b"", "Bad Request"),
        (b"x" * 10_000, "x" * 500),
    ],
)
async def test_refusal_says_what_was_answered_in_one_line(content: bytes, said: str) -> None:
    async def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(400, content=content)

    with pytest.raises(HttpRefused) as raised:
        await ask(handle)
    assert (raised.value.status, raised.value.said) == (400, said)
    assert raised.value.reason == f"/do answered 400: {said}"
    assert cause_of(raised.value) == "EngineUnavailable"  # what the bus knows of adapters


async def test_server_is_unavailable_when_its_connection_breaks() -> None:
    async def handle(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("")

    with pytest.raises(EngineUnavailable, match="/do: ReadError"):
        await ask(handle)


async def test_deadline_is_kept_when_nothing_is_answered() -> None:
    async def handle(request: httpx.Request) -> httpx.Response:
        await anyio.sleep_forever()
        raise AssertionError

    with pytest.raises(DeadlineExceeded, match="/do"):
        await ask(handle, deadline_s=0.05)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://[::1"])
async def test_server_is_unavailable_when_its_url_is_none(url: str) -> None:
    with pytest.raises(EngineUnavailable, match="URL"):
        async with open_json_server(url):
            pass
