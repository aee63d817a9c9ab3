"""`VllmControl` over the HTTP endpoints of `vllm serve`.

The connection is its opener's. The endpoints are those that vLLM shows with VLLM_SERVER_DEV_MODE=1;
which of them there are is read from `/openapi.json`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import anyio

from weightbus.consumers.engines.beside import beside
from weightbus.consumers.engines.budget import left_s
from weightbus.consumers.engines.counter import HttpCounter
from weightbus.consumers.engines.http import HttpRefused, JsonServer, open_json_server
from weightbus.consumers.engines.vllm.control import (
    NOT_RESET,
    TOKENS_COUNTER,
    PauseMode,
    StartedWith,
    VllmControl,
)
from weightbus.consumers.errors import ConsumerError, DeadlineExceeded, EngineUnavailable

__all__ = ("HttpControl", "open_http_control")

_POLL_S: Final = 0.25
_POLL_TIMEOUT_S: Final = 5.0
_PAUSED_POLL_S: Final = 0.002
_NEEDED: Final = ("pause", "resume", "is_paused", "server_info")


class HttpControl(VllmControl):
    """See `VllmControl`."""

    def __init__(self, server: JsonServer, api_key: str) -> None:
        super().__init__(server.url)
        self._server = server
        self._api_key = api_key
        self._operations: dict[str, Any] = {}
        """What the server's documents say of each."""
        self._tokens = HttpCounter(server, (TOKENS_COUNTER,), api_key)

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
        except HttpRefused as error:
            hint = "it must not be started with --disable-fastapi-docs"
            raise EngineUnavailable(self.name, f"{error.reason}: {hint}") from None
        paths: dict[str, Any] = document.get("paths", {})
        self._operations = {path.removeprefix("/"): methods for path, methods in paths.items()}
        missing = [operation for operation in _NEEDED if not self.has(operation)]
        if missing:
            raise EngineUnavailable(
                self.name,
                f"it has no /{', /'.join(missing)}: start it with VLLM_SERVER_DEV_MODE=1 in its "
                "environment (and let nobody else reach its port: whoever can, can control it)",
            )

    def has(self, operation: str) -> bool:
        return operation in self._operations

    def _takes(self, operation: str, word: str) -> bool:
        """Whether a POST takes this in its query."""
        taken = self._operations.get(operation, {}).get("post", {}).get("parameters", [])
        return any(parameter.get("name") == word for parameter in taken)

    async def world_size(self, deadline_s: float) -> int:
        if not self.has("get_world_size"):
            parallel = (await self._config(deadline_s)).get("parallel_config", {})
            ranks, copies = parallel.get("world_size"), parallel.get("data_parallel_size", 1)
            return self._one_copy(ranks * copies if isinstance(ranks, int) else None, ranks)
        end, sizes = anyio.current_time() + deadline_s, []
        for include_dp in ("true", "false"):
            query = {"include_dp": include_dp}
            answer = await self._ask("GET", "get_world_size", left_s(end), query)
            sizes.append(answer.get("world_size"))
        return self._one_copy(*sizes)

    def _one_copy(self, every: Any, ranks: Any) -> int:
        if not isinstance(ranks, int) or not isinstance(every, int):
            raise EngineUnavailable(self.name, f"it answered world sizes {every!r} and {ranks!r}")
        if every != ranks:
            raise EngineUnavailable(
                self.name,
                f"it is data parallel: {every} workers in copies of {ranks}; "
                "start every copy as a server of its own",
            )
        return ranks

    async def started_with(self, deadline_s: float) -> StartedWith:
        return StartedWith.of(await self._config(deadline_s))

    async def _config(self, deadline_s: float) -> dict[str, Any]:
        query = {"config_format": "json"}
        config = (await self._ask("GET", "server_info", deadline_s, query)).get("vllm_config")
        if not isinstance(config, dict):
            raise EngineUnavailable(self.name, "/server_info does not tell its configuration")
        return config

    async def pause(
        self, mode: PauseMode, clear_caches: bool, deadline_s: float, *, stands: bool = False
    ) -> None:
        """With `keep`, vLLM begins no step once it says that it is paused, and the next turn comes
        behind those that were begun (`StartedWith.drains`): what still runs on the device is waited
        for there, before anything is written. Its own answer comes 20 ms later."""
        query = {"mode": mode, "clear_cache": "true" if clear_caches else "false"}
        async with beside() as tasks:
            if mode == "keep" and not stands and self._drains and self.has("is_sleeping"):
                tasks.start_soon(self._until_paused, tasks.cancel_scope, deadline_s)
            await self._ask("POST", "pause", deadline_s, query)
            tasks.cancel_scope.cancel()

    async def _until_paused(self, asking: anyio.CancelScope, deadline_s: float) -> None:
        end = anyio.current_time() + deadline_s
        with suppress(ConsumerError):  # the answer to the pause tells more
            while True:
                if await self.is_paused(left_s(end)):
                    asking.cancel()
                    return
                await anyio.sleep(_PAUSED_POLL_S)

    def may_still_pause(self, error: BaseException) -> bool:
        return not isinstance(error, HttpRefused)

    async def resume(self, deadline_s: float) -> None:
        await self._ask("POST", "resume", deadline_s)

    async def is_paused(self, deadline_s: float) -> bool:
        return await self._is("is_paused", deadline_s)

    async def is_sleeping(self, deadline_s: float) -> bool:
        return self.has("is_sleeping") and await self._is("is_sleeping", deadline_s)

    async def wake_up(self, tags: Sequence[str], deadline_s: float) -> None:
        await self._ask("POST", "wake_up", deadline_s, {"tags": list(tags)})

    async def reset_caches(self, deadline_s: float) -> None:
        end = anyio.current_time() + deadline_s
        if self.has("reset_prefix_cache"):
            await self._reset_prefix_cache(deadline_s)
        if self._has_encoders():
            await self._ask("POST", "reset_encoder_cache", left_s(end))

    async def _reset_prefix_cache(self, deadline_s: float) -> None:
        query = {"reset_running_requests": "true"}
        if self._takes("reset_prefix_cache", "reset_external"):
            query["reset_external"] = "true"
        answer = await self._ask("POST", "reset_prefix_cache", deadline_s, query)
        if answer.get("success") is False:  # older versions say nothing, and mean success
            raise EngineUnavailable(self.name, NOT_RESET)

    async def set_version(self, version: str, deadline_s: float) -> None:
        if self.has("update_weight_version"):
            body = {"new_version": version}
            await self._ask("POST", "update_weight_version", deadline_s, body=body)

    async def tokens_made(self, deadline_s: float) -> float | None:
        return await self._tokens.read(deadline_s)

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
        return await self._server.ask(
            method, f"/{path}", deadline_s, query=query, body=body, key=self._api_key
        )


@asynccontextmanager
async def open_http_control(url: str, api_key: str = "") -> AsyncIterator[HttpControl]:
    """The engine at `http://host:port`; nothing is asked of it yet.

    Raises:
        EngineUnavailable: that is not a URL.
    """
    async with open_json_server(url) as server:
        yield HttpControl(server, api_key)
