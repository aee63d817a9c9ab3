"""Speaks to the HTTP server of an engine on this host: JSON or text, one deadline per request.

Owns one pool of connections. What each request means is the engine's adapter's to know.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import httpx

from weightbus.consumers.errors import DeadlineExceeded, EngineUnavailable

__all__ = ("HttpRefused", "JsonServer", "open_json_server")

KEEP_ALIVE_S: Final = 2.0
"""Less than the 5 s after which uvicorn closes: no request meets a connection that just ends."""

_MAX_REASON: Final = 500

Query = Mapping[str, str | list[str]]


class HttpRefused(EngineUnavailable):
    """The engine's server answered a request with a status that is no success."""

    told_as = EngineUnavailable.__name__

    def __init__(self, engine: str, path: str, status: int, said: str) -> None:
        self.path, self.status, self.said = path, status, said
        super().__init__(engine, f"{path} answered {status}: {said}")


class JsonServer:
    """The server of one engine."""

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self.url = url
        self._client = client

    async def ask(
        self,
        method: str,
        path: str,
        deadline_s: float,
        *,
        query: Query | None = None,
        body: Mapping[str, Any] | None = None,
        key: str = "",
    ) -> dict[str, Any]:
        """The JSON object that was answered; empty if it was something else.

        Args:
            path: begins with a slash.
            key: of the API, sent as a bearer token; empty: none.

        Raises:
            HttpRefused: it answered, and refused.
            EngineUnavailable: it did not answer.
            DeadlineExceeded: not in time; it may still do what it was asked for.
        """
        decoded = _decoded(await self._answer(method, path, deadline_s, query, body, key))
        return decoded if isinstance(decoded, dict) else {}

    async def text(
        self, path: str, deadline_s: float, *, query: Query | None = None, key: str = ""
    ) -> str:
        """The text that is got there. Arguments and errors are those of `ask`."""
        return (await self._answer("GET", path, deadline_s, query, None, key)).text

    async def _answer(
        self,
        method: str,
        path: str,
        deadline_s: float,
        query: Query | None,
        body: Mapping[str, Any] | None,
        key: str,
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            with anyio.fail_after(deadline_s):
                answer = await self._client.request(
                    method, path, params=query, json=body, headers=headers
                )
        except TimeoutError:
            raise DeadlineExceeded(f"{path} of {self.url}", deadline_s) from None
        except httpx.HTTPError as error:
            reason = f"{path}: {str(error) or type(error).__name__}"
            raise EngineUnavailable(self.url, reason) from None
        if not answer.is_success:
            raise HttpRefused(self.url, path, answer.status_code, _said(answer))
        return answer


@asynccontextmanager
async def open_json_server(url: str) -> AsyncIterator[JsonServer]:
    """The server at `http://host:port`; nothing is asked of it yet.

    Raises:
        EngineUnavailable: that is no URL.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise EngineUnavailable(url, f"it is no URL: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise EngineUnavailable(url, "its URL must be like http://127.0.0.1:8000")
    async with httpx.AsyncClient(
        base_url=parsed,
        timeout=None,  # every request has a deadline of its own
        limits=httpx.Limits(keepalive_expiry=KEEP_ALIVE_S),
        trust_env=False,  # it is on this host: no proxy leads there
    ) as client:
        yield JsonServer(url, client)


def _decoded(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return None


def _said(answer: httpx.Response) -> str:
    """What an answer that is no success says, in one line."""
    said: Any = _decoded(answer)
    for key in ("error", "message", "detail"):
        if isinstance(said, dict) and key in said:
            said = said[key]
    text = said if isinstance(said, str) else answer.text
    return " ".join(text.split())[:_MAX_REASON] or answer.reason_phrase
