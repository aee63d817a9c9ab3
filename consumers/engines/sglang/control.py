"""What a consumer does to an SGLang server beside asking its workers, over its HTTP endpoints.

Owns what is known of a session of weight updates; the connection is its opener's. Fields that are
sent are those that every version since 0.5.6 reads; a newer one's that matter to us are named.

Newer versions (0.5.23) take `/update_weights_from_tensor` within a session only. Its beginning and
its end let quantisation methods repack the weights of the runners that it selects. So ours selects
the drafter, which an engine that we take does not have: it changes nothing, and is left open.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Final, Literal

import anyio

from weightbus.consumers.engines.budget import left_s
from weightbus.consumers.engines.counter import HttpCounter
from weightbus.consumers.engines.http import HttpRefused, JsonServer, open_json_server
from weightbus.consumers.engines.sglang.payload import LOADER, SglangTurn, serialised_turn
from weightbus.consumers.engines.sglang.probing import (
    check_operations,
    check_started_as,
    ranks_of,
)
from weightbus.consumers.errors import ConsumerError, DeadlineExceeded, EngineUnavailable

__all__ = ("PauseMode", "SglangControl", "open_sglang_control", "wait_until_it_answers")

PauseMode = Literal["retract", "in_place", "abort"]
"""Running requests go back to the queue and are computed anew from their tokens; stand still with
their keys and values; end."""

FLUSH_S: Final = 2.0
"""How long a paused engine may take to be idle: the last pass is looked at after it."""

TOKEN_COUNTERS: Final = (
    "sglang:time_to_first_token_seconds_count",
    "sglang:inter_token_latency_seconds_count",
    "sglang:generation_tokens_total",
)
"""Of Prometheus. The last rises only when a request ends; one of the first two whenever a token
comes out of it."""

_POLL_S: Final = 0.1
_ASK_S: Final = 5.0
_CLOSE_S: Final = 5.0
_UNAUTHORISED: Final = (401, 403)


class SglangControl:
    """One SGLang server. Every method takes `deadline_s`, its whole budget in seconds, and raises:

    Raises:
        EngineUnavailable: it cannot be reached, or refused, and why.
        DeadlineExceeded: it did not answer in time; it may still do what it was told.
    """

    def __init__(self, server: JsonServer, api_key: str, admin_key: str) -> None:
        self.name = server.url
        self._server = server
        self._api_key = api_key
        self._admin_key = admin_key or api_key
        self._began = False
        """The session that is open was begun by us."""
        self._tokens = HttpCounter(server, TOKEN_COUNTERS, api_key)

    async def probe(self, deadline_s: float) -> int:
        """How many workers it has; to be called before everything else.

        Raises:
            EngineUnavailable: it cannot be updated; says what to start it with, or without.
        """
        name = self.name
        end = anyio.current_time() + deadline_s
        try:
            operations = await self._get("/openapi.json", deadline_s)
        except HttpRefused as error:
            if error.status in _UNAUTHORISED:
                raise
            hint = "it must not be started with DISABLE_OPENAPI_DOC in its environment"
            raise EngineUnavailable(name, f"{error.reason}: {hint}") from None
        check_operations(name, operations)
        info = await self._get("/server_info", left_s(end))
        check_started_as(name, info)
        return ranks_of(name, info)

    async def label(self, deadline_s: float) -> str:
        """What it says that it serves; answered also while its workers are busy."""
        return str((await self._get("/model_info", deadline_s)).get("weight_version", ""))

    async def set_label(self, label: str, deadline_s: float) -> None:
        body = {"new_version": label, "abort_all_requests": False}
        await self._post("/update_weight_version", deadline_s, body)

    async def pause(self, mode: PauseMode, deadline_s: float) -> None:
        """Whatever it is told after this, it does after its last step. Idempotent."""
        await self._post("/pause_generation", deadline_s, {"mode": mode})

    async def go_on(self, deadline_s: float) -> None:
        await self._post("/continue_generation", deadline_s, {"torch_empty_cache": False})

    async def tokens_made(self, deadline_s: float) -> float | None:
        """A number that rises with every token; None: it does not count them.

        Raises:
            HttpRefused: also if it was started without metrics.
        """
        return await self._tokens.read(deadline_s)

    async def flush(self, deadline_s: float) -> None:
        """Let nothing that was computed with other weights be found again. Paused only.

        Raises:
            EngineUnavailable: it does not, since it has requests.
        """
        end = anyio.current_time() + min(deadline_s, FLUSH_S)
        while True:
            try:
                await self._post("/flush_cache", deadline_s)
            except HttpRefused as error:
                if error.status in _UNAUTHORISED or anyio.current_time() >= end:
                    raise
            else:
                return
            await anyio.sleep(_POLL_S)

    async def turn(self, turn: SglangTurn, ranks: int, deadline_s: float) -> None:
        """Have every worker take this turn; returns when all have. Paused only: SGLang would wait
        until no request runs."""
        body = {
            "serialized_named_tensors": [serialised_turn(turn)] * ranks,
            "load_format": LOADER,
            "flush_cache": False,
            "abort_all_requests": False,
        }
        end = anyio.current_time() + deadline_s
        try:
            await self._post("/update_weights_from_tensor", deadline_s, body)
        except HttpRefused as error:
            if "begin_weight_update" not in error.said:
                raise
            await self._begin(left_s(end))
            await self._post("/update_weights_from_tensor", left_s(end), body)

    async def close(self) -> None:
        """End the session; the engine goes on. Raises nothing."""
        if self._began:
            with suppress(ConsumerError):
                await self._post("/end_weight_update", _CLOSE_S, {})
            self._began = False

    async def _begin(self, deadline_s: float) -> None:
        await self._post("/begin_weight_update", deadline_s, {"selector": "draft"})
        self._began = True

    async def _get(self, path: str, deadline_s: float) -> dict[str, Any]:
        with _keys_explained():
            return await self._server.ask("GET", path, deadline_s, key=self._api_key)

    async def _post(
        self, path: str, deadline_s: float, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        with _keys_explained():
            return await self._server.ask("POST", path, deadline_s, body=body, key=self._admin_key)


@asynccontextmanager
async def open_sglang_control(
    url: str, api_key: str = "", admin_key: str = ""
) -> AsyncIterator[SglangControl]:
    """The server at `http://host:port`; nothing is asked of it yet.

    Args:
        admin_key: empty: the server has none, and takes `api_key` for everything.

    Raises:
        EngineUnavailable: that is no URL.
    """
    async with open_json_server(url) as server:
        control = SglangControl(server, api_key, admin_key)
        try:
            yield control
        finally:
            with anyio.CancelScope(shield=True):
                await control.close()


async def wait_until_it_answers(control: SglangControl, deadline_s: float) -> None:
    """Returns when the server is up. `/health` would not do: it asks for a token, for which a
    paused engine is taken for dead.

    Raises:
        EngineUnavailable: it was not within `deadline_s`, or refused the key.
    """
    said = "nothing answers there"
    with anyio.move_on_after(deadline_s):
        while True:
            try:
                await control.label(_ASK_S)
            except HttpRefused as error:
                if error.status in _UNAUTHORISED:
                    raise
                said = error.reason
            except (EngineUnavailable, DeadlineExceeded) as error:
                said = str(error)
            else:
                return
            await anyio.sleep(_POLL_S)
    raise EngineUnavailable(control.name, f"it was not there within {deadline_s:g} s: {said}")


@contextmanager
def _keys_explained() -> Iterator[None]:
    """
    Raises:
        HttpRefused: with what to do about a key that was refused.
    """
    try:
        yield
    except HttpRefused as error:
        if error.status not in _UNAUTHORISED:
            raise
        hint = f"{error.said}: it wants its --api-key, or its --admin-api-key if it has one"
        raise HttpRefused(error.engine, error.path, error.status, hint) from None
