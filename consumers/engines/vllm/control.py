"""What a consumer does to a vLLM engine beside asking its workers: pause, turn, resume, ...

Owns what is known of the engine's interface, and the session that vLLM's weight transfer wants. How
its calls get there is a subclass's: by HTTP (`http.py`), or within the process (`handle.py`).

Two ways lead into vLLM's workers. What this vLLM has is found out by looking and trying, not by its
version:

    backend    init_weight_transfer_engine, then update_weights within a session: one is kept open
    extension  collective_rpc of methods that our extension class gave to its worker

A session ends with the first exception, or was left open by a consumer that died: then it is
finished and started again.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Literal

import msgspec

from weightbus.consumers.engines.turns import Turn
from weightbus.consumers.errors import ConsumerError, EngineUnavailable

__all__ = ("PauseMode", "VllmControl", "Way")

PauseMode = Literal["keep", "wait", "abort"]
"""What becomes of requests that run when the engine is paused."""

Way = Literal["backend", "extension"]

BACKEND_OPTION: Final = """--weight-transfer-config '{"backend": "weightbus"}'"""
EXTENSION_OPTION: Final = (
    "--worker-extension-cls weightbus.consumers.engines.vllm.extension.WeightBusExtension"
)

START_DRAFT: Final = "start_draft_weight_update"
_SESSION: Final = ("init_weight_transfer_engine", "start_weight_update", "update_weights")

_logger = logging.getLogger(__name__)


class VllmControl(ABC):
    """One vLLM engine. Every method takes `deadline_s`, its whole budget in seconds, and raises:

    Raises:
        EngineUnavailable: it cannot be reached, or refused, and why.
        DeadlineExceeded: it did not answer in time; it may still do what it was told.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.way: Way | None = None
        """None: not opened yet."""
        self._session = False
        """A session is open, as far as is known."""

    # ---------------------------------------------------------------- what a subclass gives

    @abstractmethod
    async def probe(self, deadline_s: float) -> None:
        """Find out what this vLLM has. To be called before everything else, and when it was
        started anew.

        Raises:
            EngineUnavailable: it lacks what we cannot do without; says what to start it with.
        """

    @abstractmethod
    def has(self, operation: str) -> bool:
        """Whether it has an operation, as named by its HTTP routes. Valid once probed."""

    @abstractmethod
    async def world_size(self, deadline_s: float) -> int:
        """How many workers it has.

        Raises:
            EngineUnavailable: it is data parallel.
        """

    @abstractmethod
    async def pause(self, mode: PauseMode, clear_caches: bool, deadline_s: float) -> None:
        """Returns when no request runs."""

    @abstractmethod
    async def resume(self, deadline_s: float) -> None: ...

    @abstractmethod
    async def is_paused(self, deadline_s: float) -> bool:
        """vLLM answers between two steps, or once a turn has ended."""

    @abstractmethod
    async def is_sleeping(self, deadline_s: float) -> bool:
        """Whether it sleeps *or* is paused: vLLM does not tell these apart. False if it cannot."""

    @abstractmethod
    async def wake_up(self, tags: Sequence[str], deadline_s: float) -> None:
        """Bring back what these tags name: `weights`, `kv_cache`; empty: everything. When nothing
        is left asleep, vLLM resumes."""

    @abstractmethod
    async def reset_caches(self, deadline_s: float) -> None:
        """Let nothing that was computed with other weights be found again: running requests are
        preempted and computed anew, from their tokens.

        Raises:
            EngineUnavailable: something could not be dropped.
        """

    @abstractmethod
    async def set_version(self, version: str, deadline_s: float) -> None:
        """What the engine says it serves, if it can say such a thing."""

    @abstractmethod
    async def _call_workers(
        self, operation: str, arguments: Mapping[str, Any], deadline_s: float
    ) -> None:
        """An operation of vLLM's weight transfer, on every worker."""

    @abstractmethod
    async def _call_method(
        self, method: str, arguments: Sequence[str], deadline_s: float
    ) -> Sequence[Any]:
        """A method of every worker; what each returned."""

    @abstractmethod
    async def _disconnect(self) -> None:
        """Let go of the connection. Raises nothing."""

    # ---------------------------------------------------------------- what is common

    async def open(self, directory: str, deadline_s: float) -> None:
        """Have every worker connect to the consumer of this directory. Idempotent, and to be called
        again when workers are new.

        Raises:
            EngineUnavailable: neither way leads in, or the workers refused: says why.
        """
        reasons = []
        if all(map(self.has, _SESSION)):
            try:
                info = {"init_info": {"directory": directory}}
                await self._call_workers(_SESSION[0], info, deadline_s)
            except EngineUnavailable as error:
                reasons.append(f"{BACKEND_OPTION}: {error.reason}")
            else:
                self.way = "backend"
                await self._start_session(deadline_s)
                return
        if self.has("collective_rpc"):
            try:
                await self._call_method("weightbus_open", [directory], deadline_s)
            except EngineUnavailable as error:
                reasons.append(f"{EXTENSION_OPTION}: {error.reason}")
            else:
                self.way = "extension"
                return
        raise EngineUnavailable(
            self.name,
            "its workers cannot be reached. Start it, with weightbus installed beside it, by one "
            f"of these options ({'; '.join(reasons) or 'it has neither way to its workers'})",
        )

    async def turn(self, turn: Turn, deadline_s: float) -> None:
        """Have every worker take this turn; returns when all have."""
        if self.way == "extension":
            encoded = msgspec.json.encode(turn).decode()
            await self._call_method("weightbus_turn", [encoded], deadline_s)
            return
        if not self._session:
            await self._start_session(deadline_s)
        try:
            info = {"update_info": msgspec.to_builtins(turn)}
            await self._call_workers("update_weights", info, deadline_s)
        except EngineUnavailable:
            self._session = False
            raise

    async def show_draft(self, deadline_s: float) -> None:
        """Have vLLM show our backend the drafter: it does when a session for drafts begins.

        Raises:
            EngineUnavailable: it has no drafter to show.
        """
        if self.way != "backend" or not self.has(START_DRAFT):
            raise EngineUnavailable(self.name, "this vLLM does not give its drafter away")
        await self._finish_session(deadline_s)
        await self._call_workers(START_DRAFT, {}, deadline_s)
        await self._start_session(deadline_s)

    async def close(self, deadline_s: float) -> None:
        """End the session; the engine goes on. Raises nothing."""
        try:
            with suppress(ConsumerError):
                if self._session:
                    await self._finish_session(deadline_s)
        finally:
            await self._disconnect()

    async def _start_session(self, deadline_s: float) -> None:
        """One that was left open is finished first."""
        try:
            await self._call_workers("start_weight_update", {}, deadline_s)
        except EngineUnavailable as error:
            _logger.info("vLLM's session is started again: %s", error)
            await self._finish_session(deadline_s)
            await self._call_workers("start_weight_update", {}, deadline_s)
        self._session = True

    async def _finish_session(self, deadline_s: float) -> None:
        self._session = False
        await self._call_workers("finish_weight_update", {}, deadline_s)
