"""`VllmControl` over the HTTP endpoints of `vllm serve`.

Owns one pool of connections. The endpoints are those that vLLM shows with VLLM_SERVER_DEV_MODE=1;
which of them there are is read from `/openapi.json`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import httpx

from weightbus.consumers.engines.vllm.control import PauseMode, VllmControl
from weightbus.consumers.errors import DeadlineExceeded, EngineUnavailable

__all__ = ("HttpControl", "open_http_control")

_KEEP_ALIVE_S: Final = 2.0
"""Less than vLLM's own 5 s: no request meets a connection that is just being closed."""

_POLL_S: Final = 0.25
_POLL_TIMEOUT_S: Final = 5.0
_NEEDED: Final = ("pause", "resume", "is_paused")
_MAX_REASON: Final = 500


class HttpControl(VllmControl):
    """See `VllmControl`."""

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        super().__init__(url)
        self._client = client
        self._operations: frozenset[str] = frozenset()

    async def wait_until_healthy(self, deadline_s: float) -> None:
        """Returns when the server answers that it is well.

        Raises:
            EngineUnavailable: it did not within `deadline_s`, and what it did instead.
        """
        said = "nothing was answered"
        with anyio.move_on_after(deadline_s):
            while True:
                try:
                    await self._ask("GET", "health", _POLL_TIMEOUT_S)
                except EngineUnavailable as error:
                    said = error.reason
                except DeadlineExceeded as error:
                    said = str(error)
                else:
                    return
                await anyio.sleep(_POLL_S)
        raise EngineUnavailable(self.name, f"it was not there within {deadline_s:g} s: {said}")

    async def probe(self, deadline_s: float) -> None:
        try:
            document = await self._ask("GET", "openapi.json", deadline_s)
        except EngineUnavailable as error:
            hint = "it must not be started with --disable-fastapi-docs"
            raise EngineUnavailable(self.name, f"{error.reason}: {hint}") from None
        paths = document.get("paths", {})
        self._operations = frozenset(path.removeprefix("/") for path in paths)
        missing = [operation for operation in _NEEDED if not self.has(operation)]
        if missing:
            raise EngineUnavailable(
                self.name,
                f"it has no /{', /'.join(missing)}: start it with VLLM_SERVER_DEV_MODE=1 in its "
                "environment (and let nobody else reach its port: whoever can, can control it)",
            )

    def has(self, operation: str) -> bool:
        return operation in self._operations

    async def world_size(self, deadline_s: float) -> int:
        if not self.has("get_world_size"):
            return len(await self._call_method("weightbus_rank", [], deadline_s))
        sizes = []
        for include_dp in ("true", "false"):
            query = {"include_dp": include_dp}
            answer = await self._ask("GET", "get_world_size", deadline_s, query)
            sizes.append(answer.get("world_size"))
        every, ranks = sizes
        if not isinstance(ranks, int) or not isinstance(every, int):
            raise EngineUnavailable(self.name, f"it answered world sizes {every!r} and {ranks!r}")
        if every != ranks:
            raise EngineUnavailable(
                self.name,
                f"it is data parallel: {every} workers in copies of {ranks}; "
                "start every copy as a server of its own",
            )
        return ranks

    async def pause(self, mode: PauseMode, clear_caches: bool, deadline_s: float) -> None:
        query = {"mode": mode, "clear_cache": "true" if clear_caches else "false"}
        await self._ask("POST", "pause", deadline_s, query)

    async def resume(self, deadline_s: float) -> None:
        await self._ask("POST", "resume", deadline_s)

    async def is_paused(self, deadline_s: float) -> bool:
        return await self._is("is_paused", deadline_s)

    async def is_sleeping(self, deadline_s: float) -> bool:
        return self.has("is_sleeping") and await self._is("is_sleeping", deadline_s)

    async def wake_up(self, tags: Sequence[str], deadline_s: float) -> None:
        await self._ask("POST", "wake_up", deadline_s, {"tags": list(tags)})

    async def reset_caches(self, deadline_s: float) -> None:
        if self.has("reset_prefix_cache"):
            query = {"reset_running_requests": "true"}
            answer = await self._ask("POST", "reset_prefix_cache", deadline_s, query)
            if answer.get("success") is False:  # older versions say nothing, and mean success
                raise EngineUnavailable(self.name, "its prefix cache could not be reset")
        if self.has("reset_encoder_cache"):
            await self._ask("POST", "reset_encoder_cache", deadline_s)

    async def set_version(self, version: str, deadline_s: float) -> None:
        if self.has("update_weight_version"):
            body = {"new_version": version}
            await self._ask("POST", "update_weight_version", deadline_s, body=body)

    async def _call_workers(
        self, operation: str, arguments: Mapping[str, Any], deadline_s: float
    ) -> None:
        body = dict(arguments) if arguments else None
        await self._ask("POST", operation, deadline_s, body=body)

    async def _call_method(
        self, method: str, arguments: Sequence[str], deadline_s: float
    ) -> Sequence[Any]:
        body = {"method": method, "args": list(arguments)}
        answer = await self._ask("POST", "collective_rpc", deadline_s, body=body)
        results = answer.get("results", [])
        return results if isinstance(results, list) else []

    async def _disconnect(self) -> None:
        """Closed by its opener."""

    async def _is(self, operation: str, deadline_s: float) -> bool:
        answer = await self._ask("GET", operation, deadline_s)
        if not isinstance(answer.get(operation), bool):
            raise EngineUnavailable(self.name, f"/{operation} answered {answer!r}")
        return bool(answer[operation])

    async def _ask(
        self,
        method: str,
        path: str,
        deadline_s: float,
        query: Mapping[str, str | list[str]] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The JSON object that was answered; empty if it was something else."""
        what = f"/{path} of {self.name}"
        try:
            with anyio.fail_after(deadline_s):
                answer = await self._client.request(method, f"/{path}", params=query, json=body)
        except TimeoutError:
            raise DeadlineExceeded(what, deadline_s) from None
        except httpx.HTTPError as error:
            reason = f"/{path}: {str(error) or type(error).__name__}"
            raise EngineUnavailable(self.name, reason) from None
        if not answer.is_success:
            reason = f"/{path} answered {answer.status_code}: {_said(answer)}"
            raise EngineUnavailable(self.name, reason)
        decoded = _decoded(answer)
        return decoded if isinstance(decoded, dict) else {}


@asynccontextmanager
async def open_http_control(url: str, api_key: str = "") -> AsyncIterator[HttpControl]:
    """The engine at `http://host:port`; nothing is asked of it yet.

    Raises:
        EngineUnavailable: that is not a URL.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise EngineUnavailable(url, f"it is no URL: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise EngineUnavailable(url, "its URL must be like http://127.0.0.1:8000")
    async with httpx.AsyncClient(
        base_url=parsed,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=None,  # every request has a deadline of its own
        limits=httpx.Limits(keepalive_expiry=_KEEP_ALIVE_S),
        trust_env=False,  # it is on this host: no proxy leads there
    ) as client:
        yield HttpControl(url, client)


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
