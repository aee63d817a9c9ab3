"""A client of vLLM's HTTP server: what its users ask of it, and what a benchmark does.

Owns one pool of connections while `open_server` is open. Whatever fails is `BenchFailed`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import httpx
import msgspec

from benchmarks.h200.processes import BenchFailed
from benchmarks.vllm_h200.setup import MODEL

__all__ = ("Server", "completion", "open_server")

CONTROL_S: Final = 60.0
KEEP_ALIVE_S: Final = 2.0
"""Less than the server's 5 s: no request meets a connection that is just being closed."""
CONNECTIONS: Final = 64
MAX_REASON: Final = 500


class Server:
    """Made by `open_server`."""

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self.url, self._client = url, client

    async def is_healthy(self) -> bool:
        try:
            with anyio.fail_after(CONTROL_S):
                return (await self._client.get("/health")).is_success
        except (httpx.HTTPError, TimeoutError):
            return False

    async def call(self, method: str, *arguments: str, deadline_s: float) -> list[Any]:
        """A method of every worker; what each returned."""
        body = {"method": method, "args": list(arguments)}
        answer = await self._post("/collective_rpc", deadline_s, body)
        results: list[Any] = answer.json()["results"] if answer.content else []
        return results

    async def pause(self) -> None:
        """As our consumer does: running requests are kept, and caches dropped."""
        await self._post("/pause?mode=keep&clear_cache=true", CONTROL_S)

    async def resume(self) -> None:
        await self._post("/resume", CONTROL_S)

    async def complete(
        self, prompt: Sequence[int], tokens: int, deadline_s: float = CONTROL_S
    ) -> list[int]:
        """Greedy output, as token ids."""
        answer = await self._post("/v1/completions", deadline_s, completion(prompt, tokens))
        (choice,) = answer.json()["choices"]
        found: list[int] = choice["token_ids"]
        return found

    @asynccontextmanager
    async def stream(
        self, prompt: Sequence[int], tokens: int
    ) -> AsyncIterator[AsyncIterator[list[int]]]:
        """The same, in pieces, as they are generated. The caller has a deadline."""
        body = completion(prompt, tokens) | {"stream": True}
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise BenchFailed(_refusal("/v1/completions", answer))
                yield _pieces(answer.aiter_lines())
        except httpx.HTTPError as error:
            raise BenchFailed(f"a request broke off: {error!r}") from None

    async def _post(self, path: str, deadline_s: float, body: Any = None) -> httpx.Response:
        try:
            with anyio.fail_after(deadline_s):
                answer = await self._client.post(path, json=body)
        except TimeoutError:
            reason = f"{path} of vLLM was not answered within {deadline_s:g} s"
            raise BenchFailed(reason) from None
        except httpx.HTTPError as error:
            raise BenchFailed(f"{path} of vLLM: {error!r}") from None
        if not answer.is_success:
            raise BenchFailed(_refusal(path, answer))
        return answer


@asynccontextmanager
async def open_server(url: str) -> AsyncIterator[Server]:
    """Nothing is asked of it yet."""
    limits = httpx.Limits(max_connections=CONNECTIONS, keepalive_expiry=KEEP_ALIVE_S)
    async with httpx.AsyncClient(
        base_url=url, timeout=None, limits=limits, trust_env=False
    ) as client:
        yield Server(url, client)


def completion(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    """A request that ends after so many tokens, and not before."""
    return {
        "model": MODEL,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


async def _pieces(lines: AsyncIterator[str]) -> AsyncIterator[list[int]]:
    """Tokens of a stream of server-sent events, which must end in order."""
    async for line in lines:
        told = line.removeprefix("data: ")
        if told == "[DONE]":
            return
        if line:
            said = msgspec.json.decode(told)
            if "choices" not in said:
                raise BenchFailed(f"a request failed: {told[:MAX_REASON]}")
            for choice in said["choices"]:
                yield choice["token_ids"] or []
    raise BenchFailed("the answer to a request broke off")


def _refusal(path: str, answer: httpx.Response) -> str:
    said = " ".join(answer.text.split())[:MAX_REASON]
    return f"{path} of vLLM answered {answer.status_code}: {said}"
