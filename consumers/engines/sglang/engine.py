"""The `sglang` engine as a consumer sees it: an SGLang server and its workers behind one `Engine`.

Owns the connection to the server, the channel to its workers, and a file in the engine's directory
that says what was served last. The engine itself is somebody else's, and goes on when this closes.

A turn needs a paused server: else SGLang lets it wait until no request runs, and no other begin. So
turns outside of updates pause the server for as long as they take; requests that run stand still,
and go on with their keys and values. SGLang does not tell whether it is paused: only one consumer,
and nobody else, may pause an engine and let it go on.

With `caches` at `reset`, what was computed with the old weights is dropped as soon as the server is
paused for an update, before anything is written: one that cannot is refused then, and goes on.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import anyio
from msgspec import Struct

from weightbus.bus.host import host_id as this_host_id
from weightbus.consumers.engines.asking import REPLIES, Outcomes
from weightbus.consumers.engines.budget import left_s
from weightbus.consumers.engines.channel import WorkerChannel, open_channel
from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.engine import EngineReport, TokenSeen
from weightbus.consumers.engines.served import (
    SERVED_FILE,
    Served,
    ServingEngine,
    instances_of,
    write_served,
)
from weightbus.consumers.engines.sglang.payload import SglangTurn
from weightbus.consumers.engines.tokens import first_rise
from weightbus.consumers.engines.turns import NO_REQUEST, Turn
from weightbus.consumers.errors import ConsumerError, EngineUnavailable
from weightbus.schemas.worker import Applied, Feed, WorkerMessage

if TYPE_CHECKING:
    from weightbus.consumers.engines.sglang.control import PauseMode, SglangControl

__all__ = ("START_TIMEOUT_S", "SglangEngine", "SglangSettings", "open_sglang_engine")

START_TIMEOUT_S: Final = 600.0

GO_ON_S: Final = 5.0
"""How long a server may take to go on after a turn, beyond the turn's own time."""

CONNECT_S: Final = 2.0
"""How long a worker may take to connect once it has had a turn."""

_POLL_S: Final = 0.02

_logger = logging.getLogger(__name__)


class SglangSettings(Struct, frozen=True, kw_only=True):
    """How an engine is treated."""

    pause: Literal["keep", "abort"] = "keep"
    """What becomes of requests that run when an update comes: they go on after it, or end."""
    caches: Literal["reset", "keep"] = "reset"
    """What becomes of what was computed with the old weights: dropped, so that requests that go on
    compute their keys and values anew from their tokens; or used on."""
    api_key: str = ""
    """As in SGLang's `--api-key`."""
    admin_key: str = ""
    """As in SGLang's `--admin-api-key`; empty: `api_key`."""

    @property
    def pause_mode(self) -> PauseMode:
        """SGLang's word for it."""
        if self.pause == "abort":
            return "abort"
        return "retract" if self.caches == "reset" else "in_place"


class SglangEngine(ServingEngine):
    """See `Engine` and `AskingEngine`."""

    kind = "sglang"

    def __init__(
        self,
        control: SglangControl,
        channel: WorkerChannel,
        place: EngineDirectory,
        settings: SglangSettings,
        roots: Sequence[str],
        host_id: str,
    ) -> None:
        super().__init__(channel, place, roots, host_id)
        self._control = control
        self._settings = settings
        self._stands = False
        """A turn could not let it go on, as far as is known."""
        self._label = ""
        """What it said, or was told, that it serves."""
        self._pauses = 0
        """How many were begun."""

    async def open(self, deadline_s: float) -> None:
        """Find out what the workers hold. A server that holds what was served last goes on; another
        stays paused until a version is written and proven.

        Raises:
            EngineUnavailable, DeadlineExceeded, WorkerLost
            ApplyFailed: a worker refused.
        """
        end = anyio.current_time() + deadline_s
        self._label = await self._control.label(deadline_s)
        await self._control.pause("in_place", left_s(end))
        self._paused = True
        try:
            await self.inspect(None, left_s(end))
        finally:
            known = len(self._held) == self.ranks
            if not self._is_changed() if known else self._served is None:
                self._paused = False
                await self._go_on()

    async def pause(self, deadline_s: float) -> None:
        end = anyio.current_time() + deadline_s
        self._pauses += 1
        if self._served is None and len(self._held) == self.ranks:
            self._note_served(-1)  # whoever comes next knows that an update may have begun
        await self._control.pause(self._settings.pause_mode, deadline_s)
        if self._settings.caches == "reset":
            try:
                await self._control.flush(left_s(end))
            except ConsumerError as error:
                if not self._paused:
                    await self._go_on()
                reason = "its caches cannot be reset beside requests that wait"
                raise EngineUnavailable(self._control.name, f"{reason}: {error}") from None
        self._paused = True

    async def apply(
        self,
        version: int,
        layout_digest: str,
        feeds: Mapping[int, Feed],
        deadline_s: float,
    ) -> tuple[Applied, ...]:
        self._begin(feeds)
        return await super().apply(version, layout_digest, feeds, deadline_s)

    async def resume(self, version: int, deadline_s: float) -> None:
        """
        Raises:
            EngineUnavailable: a rank does not hold this version whole, or the server refused.
        """
        end = anyio.current_time() + deadline_s
        await self._check_held(version, deadline_s)
        self._note_served(version)
        if version >= 0:
            await self._control.set_label(str(version), left_s(end))
            self._label = str(version)
        await self._control.go_on(left_s(end))
        self._paused = self._stands = False

    async def first_token(self, version: int, deadline_s: float) -> TokenSeen | None:
        """Seen by SGLang's own counters, if it was started with `--enable-metrics`."""
        pauses = self._pauses
        if self._paused or self._served is None or self._served.version != version:
            return None
        return await first_rise(
            self._control.tokens_made, lambda: pauses != self._pauses, deadline_s
        )

    async def state(self, deadline_s: float) -> EngineReport:
        """Asks the server what it says that it serves; one that was started anew has forgotten. The
        workers are asked only then, and not while a turn is under way."""
        end = anyio.current_time() + deadline_s
        label = await self._control.label(deadline_s)
        if not self._turns.locked():
            if label != self._label:
                await self.inspect(None, left_s(end))
                self._label = label
            elif self._stands and not self._paused:
                await self._go_on()
        changed = self._is_changed()
        version = self._served.version if self._served is not None and self._is_same() else -1
        return EngineReport(
            version=version,
            paused=self._paused,
            touched=changed,
            ranks=self.ranks,
            error=self._error,
        )

    # ---------------------------------------------------------------- turns

    async def _open_ranks(self, deadline_s: float) -> None:
        """Every turn says where the consumer is."""

    async def _give_turn(self, turn: Turn, deadline_s: float) -> None:
        end = anyio.current_time() + deadline_s
        message = SglangTurn(directory=str(self._place.path), turn=turn)
        self._stands = True
        try:
            await self._control.pause("in_place", deadline_s)  # it may have been started anew
            await self._control.turn(message, self.ranks, left_s(end))
        finally:
            if not self._paused:
                await self._go_on()
        await self._check_connected(turn, left_s(end))

    async def _go_on(self) -> None:
        """Shielded. If it fails, `state` and every later turn try again."""
        self._stands = True
        with anyio.CancelScope(shield=True):
            try:
                await self._control.go_on(GO_ON_S)
            except ConsumerError as error:
                _logger.error("the engine may stand still: %s", error)
                return
        self._stands = False

    async def _check_connected(self, turn: Turn, deadline_s: float) -> None:
        """What goes wrong before a worker can answer, its server's log tells.

        Raises:
            EngineUnavailable: a worker that had a turn has not connected.
        """
        waiting = [rank for rank, number in enumerate(turn.numbers) if number != NO_REQUEST]
        with anyio.move_on_after(min(CONNECT_S, deadline_s)):
            while waiting:
                if await self._channel.is_connected(waiting[0]):
                    waiting.pop(0)
                else:
                    await anyio.sleep(_POLL_S)
        if waiting:
            reason = (
                f"its rank {waiting[0]} had a turn and did not connect to {self._place.path}: "
                "see the server's log"
            )
            raise EngineUnavailable(self._control.name, reason)

    async def _ask(
        self, requests: Mapping[int, WorkerMessage], deadline_s: float, *, adopt: bool = False
    ) -> Outcomes:
        outcomes = await super()._ask(requests, deadline_s, adopt=adopt)
        self._learn(outcomes)
        return outcomes

    def _on_new_workers(self) -> None:
        self._paused = False

    def _note_served(self, version: int) -> None:
        """
        Raises:
            EngineUnavailable: it cannot be written.
        """
        self._served = Served(version, self._ranks_held())
        write_served(self._place.path / SERVED_FILE, self._served)

    def _is_same(self) -> bool:
        """Whether the workers are those that served last."""
        return self._served is not None and (
            instances_of(self._served.ranks) == instances_of(self._ranks_held())
        )

    def _is_changed(self) -> bool:
        """Whether the workers may hold something else than what they served last."""
        held = self._ranks_held()
        if self._served is not None and self._is_same():
            return self._served.ranks != held
        return any(rank.updates > 0 for rank in held)


@asynccontextmanager
async def open_sglang_engine(
    directory: Path,
    *,
    url: str,
    settings: SglangSettings | None = None,
    roots: Sequence[str] = (),
    host_id: str | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> AsyncIterator[SglangEngine]:
    """The SGLang server at `http://host:port`, once all its workers answer.

    Its workers meet the consumer in `directory`, which is created for this user alone. They read
    files only below `roots`, and shared memory only of the host `host_id` (by default this one).

    Raises:
        EngineUnavailable: there is none, it cannot be updated, or it has another consumer.
        ConsumerError: its workers do not answer, or refuse.
    """
    try:
        from weightbus.consumers.engines.sglang.control import (
            open_sglang_control,
            wait_until_it_answers,
        )
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed: pip install 'weightbus[http]'"
        raise EngineUnavailable(url, reason) from None
    settings = settings or SglangSettings()
    end = anyio.current_time() + start_timeout_s
    place = EngineDirectory(directory)
    place.prepare()
    async with AsyncExitStack() as stack:
        control = await stack.enter_async_context(
            open_sglang_control(url, settings.api_key, settings.admin_key)
        )
        await wait_until_it_answers(control, start_timeout_s)
        ranks = await control.probe(left_s(end))
        channel = await stack.enter_async_context(open_channel(place.control, ranks, REPLIES))
        engine = SglangEngine(control, channel, place, settings, roots, host_id or this_host_id())
        await engine.open(left_s(end))
        yield engine
