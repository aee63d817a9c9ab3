"""The `vllm` engine as a consumer sees it: vLLM's control and its workers behind one `Engine`.

Owns the connection to vLLM, the channel to its workers, and a file in the engine's directory that
says what was served last. The engine itself is somebody else's, and goes on when this closes.

What is computed with weights and kept outlives an update unless it is dropped. With `caches` at
`reset` vLLM drops it while it is paused: the blocks of the prefix cache, those of a connector, and
what encoders made. In modes `wait` and `abort` it does so as part of the pause, so that an engine
that cannot is refused before anything is written; in mode `keep`, whose documentation leaves open
whether the pause does, it is asked beside the weights' being written, and its answer is looked at
before it serves. Blocks of running requests cannot be told from the others by vLLM: such requests
are preempted, and when they go on, their keys and values are computed anew with the new weights,
from the prompt and the tokens that they have made so far. No request is lost. With `caches` at
`keep` nothing is dropped: running requests go on at once, on keys and values of the old weights,
and new requests find them.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import anyio
from msgspec import Struct

from weightbus.bus.host import host_id as this_host_id
from weightbus.consumers.engines.asking import REPLIES, SETTLE_S, Outcomes
from weightbus.consumers.engines.beside import beside
from weightbus.consumers.engines.budget import left_s
from weightbus.consumers.engines.channel import WorkerChannel, open_channel
from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.engine import EngineReport, TokenSeen
from weightbus.consumers.engines.errors import DraftUnknown, EngineAsleep
from weightbus.consumers.engines.served import (
    SERVED_FILE,
    Served,
    ServingEngine,
    instances_of,
    write_served,
)
from weightbus.consumers.engines.tokens import first_rise
from weightbus.consumers.engines.turns import Turn
from weightbus.consumers.engines.vllm.control import PauseMode, VllmControl
from weightbus.consumers.engines.vllm.places import OpenPlaces
from weightbus.consumers.errors import ConsumerError, DeadlineExceeded, EngineUnavailable
from weightbus.schemas.worker import (
    Applied,
    Attach,
    Failed,
    Feed,
    Inspect,
    Inspected,
    Prepare,
    Prepared,
    WorkerMessage,
)

if TYPE_CHECKING:
    from weightbus.consumers.engines.vllm.handle import VllmHandle

__all__ = ("START_TIMEOUT_S", "VllmEngine", "VllmSettings", "open_vllm_engine")

START_TIMEOUT_S: Final = 600.0
CLOSE_S: Final = 5.0

CONNECT_S: Final = 5.0
"""How long a worker that was told to connect may take to be there."""

PROBES_PER_TURN: Final = 200
"""How often it may be looked whether workers are there before they must read what that sends them:
a worker reads in its turns only, and 1000 frames wait at most."""

TAKE_BACK_S: Final = 5.0
"""How long a pause that was given up may be on its way to vLLM's core."""

PREPARE_S: Final = 0.1

_CONNECT_POLL_S: Final = 0.01

_NO_LAYOUT: Final = "0" * 64
"""Digest of a layout that nobody attaches."""

_logger = logging.getLogger(__name__)


class VllmSettings(Struct, frozen=True, kw_only=True):
    """How an engine is treated."""

    pause: PauseMode = "keep"
    """What becomes of requests that run when an update comes: they go on after it, it waits for
    them, or they are aborted."""
    sleeping: Literal["refuse", "wake"] = "refuse"
    """What is done when the engine sleeps and a version comes."""
    caches: Literal["reset", "keep"] = "reset"
    """What becomes of what was computed with the old weights; see above."""
    api_key: str = ""
    """As in vLLM's `--api-key`."""


class VllmEngine(ServingEngine):
    """See `Engine` and `AskingEngine`.

    vLLM takes any command at any time. So that no part of an update is served, the engine must be
    paused through here before `apply`, and `resume` serves what every rank holds whole only.
    """

    kind = "vllm"

    def __init__(
        self,
        control: VllmControl,
        channel: WorkerChannel,
        place: EngineDirectory,
        settings: VllmSettings,
        roots: Sequence[str],
        host_id: str,
    ) -> None:
        super().__init__(channel, place, roots, host_id)
        self._control = control
        self._settings = settings
        self._commands = 0
        """How many commands that pause or resume have begun or ended."""
        self._is_awake = False
        """As `before_pause` has seen, since the last pause."""
        self._stands = False
        """And that it slept, or was paused."""
        self._woken = False
        """A part of it sleeps still, and is ours to wake."""
        self._stale_caches: ConsumerError | None = None
        """Why what was computed with other weights may still be found; None: it cannot."""
        self._discards: tuple[int, ...] = ()
        """How often each rank's weights had been discarded when it last said what it holds."""
        self._asked_discards: tuple[int, ...] = ()
        """And when it was last asked."""
        self._prepare_at = 0.0
        """On the event loop's clock: not before."""
        self._open = OpenPlaces()
        self._probes = 0

    async def pause(self, deadline_s: float) -> None:
        """One that fails, or is cancelled, leaves no engine paused that was not."""
        end = anyio.current_time() + deadline_s
        if not self._is_awake:
            await self.before_pause(deadline_s)
        self._is_awake, was_paused = False, self._paused or self._stands
        settings = self._settings
        self._commands += 1
        try:
            clear = settings.caches == "reset" and settings.pause != "keep"  # else beside `apply`
            await self._control.pause(settings.pause, clear, left_s(end), stands=was_paused)
            self._paused = True
        except BaseException as error:
            if not was_paused:
                await self._take_back_pause(may_come=self._control.may_still_pause(error))
            raise
        finally:
            self._commands += 1

    async def before_pause(self, deadline_s: float) -> None:
        """Its parameters are where they can be written: see `VllmSettings.sleeping`."""
        end = anyio.current_time() + deadline_s
        self._is_awake = False
        self._stands = await self._control.is_sleeping(deadline_s)
        if self._stands:  # it sleeps, or is paused, by whomever
            await self._wake(left_s(end))
        self._is_awake = True

    async def _take_back_pause(self, *, may_come: bool) -> None:
        """Nothing was written: it goes on as it did."""
        with anyio.CancelScope(shield=True):
            try:
                await self._control.take_back_pause(TAKE_BACK_S, may_come=may_come)
            except ConsumerError as error:
                _logger.error("the engine may stand still: %s", error)

    async def prepare(
        self, layout_digest: str, feeds: Mapping[int, Feed], deadline_s: float
    ) -> tuple[Prepared, ...]:
        """Each question is a call between two steps of the requests that run: ranks that took bytes
        from the same places before are not asked, and while something is under way the others no
        more often than every `PREPARE_S`."""
        new = {rank: feed for rank, feed in feeds.items() if not self._open.has(rank, feed)}
        replies = {rank: Prepared(request=0, rank=rank, ready=True) for rank in feeds}
        if new:
            end = anyio.current_time() + deadline_s
            await anyio.sleep(max(0.0, min(self._prepare_at, end) - anyio.current_time()))
            self._open.ask(new)
            asked = await super().prepare(layout_digest, new, left_s(end))
            self._open.answer({reply.rank: new[reply.rank] for reply in asked if reply.ready})
            if not all(reply.ready for reply in asked):
                self._prepare_at = anyio.current_time() + PREPARE_S
            replies |= {reply.rank: reply for reply in asked}
        return tuple(replies[rank] for rank in feeds)

    async def inspect(self, layout_digest: str | None, deadline_s: float) -> tuple[Inspected, ...]:
        inspected = await super().inspect(layout_digest, deadline_s)
        self._discards = self._asked_discards
        return inspected

    async def look(self, deadline_s: float) -> tuple[Inspected, ...]:
        """Not asked for again while nothing can have become of it."""
        if await self._is_sure():
            return tuple(self._held[rank] for rank in range(self.ranks))
        return await self.inspect(None, deadline_s)

    async def apply(
        self,
        version: int,
        layout_digest: str,
        feeds: Mapping[int, Feed],
        deadline_s: float,
    ) -> tuple[Applied, ...]:
        self._begin(feeds)
        before = self._open.begin(feeds)
        applied = await self._apply(version, layout_digest, feeds, deadline_s)
        self._open.end(feeds, before)
        return applied

    async def _apply(
        self, version: int, layout_digest: str, feeds: Mapping[int, Feed], deadline_s: float
    ) -> tuple[Applied, ...]:
        if self._settings.pause != "keep" or self._settings.caches != "reset":
            return await super().apply(version, layout_digest, feeds, deadline_s)
        before = self._stale_caches
        if before is None:
            self._stale_caches = EngineUnavailable(self._control.name, "its caches were not reset")
        dropping = anyio.CancelScope(shield=True)  # one that came late would meet running requests

        async def drop() -> None:
            with dropping:
                await self._drop_caches(deadline_s)

        try:
            async with beside() as tasks:
                tasks.start_soon(drop)
                try:
                    return await super().apply(version, layout_digest, feeds, deadline_s)
                except BaseException:
                    dropping.deadline = anyio.current_time() + SETTLE_S
                    raise
        except ConsumerError as error:
            if before is None and not error.touched:
                self._stale_caches = None
            raise

    async def _drop_caches(self, deadline_s: float) -> None:
        """Beside the turn: vLLM does it before or after, and nothing is computed meanwhile."""
        try:
            await self._control.reset_caches(deadline_s)
        except ConsumerError as error:
            self._stale_caches = error
        else:
            self._stale_caches = None

    async def resume(self, version: int, deadline_s: float) -> None:
        """An engine of which a part sleeps, and was not woken by us, serves once that is woken.

        Raises:
            EngineUnavailable: a rank does not hold this version whole, or vLLM refused.
        """
        end = anyio.current_time() + deadline_s
        await self._check_held(version, deadline_s)
        if self._stale_caches is not None:
            await self._drop_caches(left_s(end))
        if self._stale_caches is not None:
            raise self._stale_caches
        served = Served(version, self._ranks_held())
        write_served(self._place.path / SERVED_FILE, served)
        self._served = served
        if version >= 0:  # before it goes on: vLLM marks every token with it
            await self._control.set_version(str(version), left_s(end))
        if self._woken:
            await self._control.wake_up((), left_s(end))
            self._woken = False
        elif self._control.is_partly_asleep():
            return
        self._commands += 1
        await self._control.resume(left_s(end))
        self._paused, self._commands = False, self._commands + 1

    async def first_token(self, version: int, deadline_s: float) -> TokenSeen | None:
        """Seen by vLLM's own counter of tokens."""
        commands = self._commands
        if self._paused or self._served is None or self._served.version != version:
            return None
        return await first_rise(
            self._control.tokens_made, lambda: commands != self._commands, deadline_s
        )

    async def state(self, deadline_s: float) -> EngineReport:
        """Asks vLLM only while no turn of ours is under way, which it would wait for."""
        if not self._turns.locked():
            end = anyio.current_time() + deadline_s
            commands = self._commands
            paused = await self._control.is_paused(deadline_s)
            if commands == self._commands:
                self._paused = paused
            is_known = self._control.is_silent() or await self._is_sure()
            if not is_known and not self._turns.locked():
                await self.inspect(None, left_s(end))
        served, held = self._served, self._ranks_held()
        if served is not None and instances_of(served.ranks) == instances_of(held):
            version, touched = served.version, served.ranks != held
        else:
            version, touched = -1, any(rank.touched or rank.updates > 0 for rank in held)
        return EngineReport(
            version=version,
            paused=self._paused,
            touched=touched,
            ranks=self.ranks,
            error=self._error,
        )

    # ---------------------------------------------------------------- turns

    async def open(self, deadline_s: float) -> None:
        """Connect to the workers, and find out what they hold.

        Raises:
            EngineUnavailable, DeadlineExceeded, WorkerLost
            ApplyFailed: a worker refused.
        """
        end = anyio.current_time() + deadline_s
        await self._connect(deadline_s)
        self._paused = await self._control.is_paused(left_s(end))
        await self.inspect(None, left_s(end))

    async def _open_ranks(self, deadline_s: float) -> None:
        if not await self._are_connected():
            await self._connect(deadline_s)
        self._asked_discards = self._control.discards(self._discards)

    async def _connect(self, deadline_s: float) -> None:
        """Whatever server is there now."""
        end = anyio.current_time() + deadline_s
        await self._control.probe(deadline_s)
        ranks = await self._control.world_size(left_s(end))
        if ranks != self.ranks:
            reason = f"it has {ranks} workers now, and had {self.ranks}: start its consumer anew"
            raise EngineUnavailable(self._control.name, reason)
        await self._control.open(self._place.path, left_s(end))
        with anyio.move_on_after(min(CONNECT_S, left_s(end))):
            while True:
                if await self._are_connected():
                    return
                await anyio.sleep(_CONNECT_POLL_S)

    async def _is_sure(self) -> bool:
        """Whether every rank holds what it is known to."""
        return len(self._sure) == self.ranks and not await self._is_stale()

    async def _is_stale(self) -> bool:
        """Whether something may have become of the workers since they were asked last, or they were
        looked for too often without a turn."""
        if self._control.is_silent() or self._control.discards(self._discards) != self._discards:
            return True
        return self._probes >= PROBES_PER_TURN or not await self._are_connected()

    async def _are_connected(self) -> bool:
        """Whether a worker of every rank is there. Each sees that it was looked for when it has a
        turn."""
        self._probes += 1
        for rank in range(self.ranks):
            if not await self._channel.is_connected(rank):
                return False
        return True

    async def close(self) -> None:
        """Leave vLLM as it was found, but for the weights. Raises nothing."""
        with anyio.CancelScope(shield=True), suppress(ConsumerError):
            if await self._are_connected():
                await self._control.leave(CLOSE_S)

    async def _give_turn(self, turn: Turn, deadline_s: float) -> None:
        """Only to workers that were opened: another server's must not be asked what they refuse."""
        if not await self._are_connected():
            raise EngineUnavailable(self._control.name, "its workers are gone")
        await self._control.turn(turn, deadline_s)
        self._probes = 0

    async def _ask(
        self, requests: Mapping[int, WorkerMessage], deadline_s: float, *, adopt: bool = False
    ) -> Outcomes:
        end = anyio.current_time() + deadline_s
        if not all(isinstance(request, Attach | Prepare) for request in requests.values()):
            self._sure -= requests.keys()
        outcomes = await super()._ask(requests, deadline_s, adopt=adopt)
        if any(_failed_with(DraftUnknown, outcome) for outcome in outcomes.values()):
            try:
                await self._show_draft(left_s(end))
            except ConsumerError as error:
                return dict.fromkeys(requests, error)
            outcomes = await super()._ask(requests, left_s(end), adopt=adopt)
        self._learn(outcomes)
        return outcomes

    async def _show_draft(self, deadline_s: float) -> None:
        """Between two turns: it ends the session in which they are given."""
        end = anyio.current_time() + deadline_s
        with anyio.move_on_after(deadline_s):
            async with self._turns:
                await self._control.show_draft(left_s(end))
                return
        raise DeadlineExceeded("the turn before", deadline_s)

    # ---------------------------------------------------------------- sleep

    def _on_new_workers(self) -> None:
        """They are told from the old also when vLLM has discarded what they held."""
        self._open.forget()
        now = self._control.discards(self._discards)
        if any(more > before for more, before in zip(now, self._discards, strict=False)):
            self._error = "its weights were discarded while it slept (level 2)"

    async def _wake(self, deadline_s: float) -> None:
        """Bring back the parameters of an engine that sleeps; one that is only paused is left as it
        is.

        Raises:
            EngineUnavailable: it sleeps, and must not be woken.
        """
        end = anyio.current_time() + deadline_s
        ask = Inspect(request=0, layout_digest=_NO_LAYOUT, deadline_s=deadline_s)
        outcomes = await self._ask({0: ask}, deadline_s)
        if not _failed_with(EngineAsleep, outcomes[0]):
            self._woken = self._settings.sleeping == "wake" and self._control.is_partly_asleep()
            return
        if self._settings.sleeping == "refuse":
            reason = "it sleeps: wake it first, or let its consumer do so (sleeping: wake)"
            raise EngineUnavailable(self._control.name, reason)
        await self._control.wake_up(("weights",), left_s(end))
        self._woken = True


@asynccontextmanager
async def open_vllm_engine(
    directory: Path,
    *,
    url: str | None = None,
    handle: VllmHandle | None = None,
    settings: VllmSettings | None = None,
    roots: Sequence[str] = (),
    host_id: str | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> AsyncIterator[VllmEngine]:
    """The vLLM engine behind a URL, or the one in this process, once all its workers answer.

    Its workers meet the consumer in `directory`, which is created for this user alone. They read
    files only below `roots`, and shared memory only of the host `host_id` (by default this one).
    Exactly one of `url` (`http://host:port`) and `handle` is given.

    Raises:
        EngineUnavailable: there is none, it lacks what we need, or it has another consumer.
        ConsumerError: its workers do not answer, or refuse.
    """
    settings = settings or VllmSettings()
    end = anyio.current_time() + start_timeout_s
    place = EngineDirectory(directory)
    place.prepare()
    async with AsyncExitStack() as stack:
        control = await stack.enter_async_context(
            _open_control(url, handle, settings, start_timeout_s)
        )
        await control.probe(left_s(end))
        ranks = await control.world_size(left_s(end))
        channel = await stack.enter_async_context(open_channel(place.control, ranks, REPLIES))
        engine = VllmEngine(control, channel, place, settings, roots, host_id or this_host_id())
        stack.push_async_callback(engine.close)
        await engine.open(left_s(end))
        yield engine


@asynccontextmanager
async def _open_control(
    url: str | None, handle: VllmHandle | None, settings: VllmSettings, deadline_s: float
) -> AsyncIterator[VllmControl]:
    if (url is None) == (handle is None):
        raise ValueError("exactly one of url and handle must be given")
    if handle is not None:
        from weightbus.consumers.engines.vllm.handle import open_handle_control

        async with open_handle_control(handle) as within:
            yield within
        return
    assert url is not None
    try:
        from weightbus.consumers.engines.vllm.http import open_http_control
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed: pip install 'weightbus[http]'"
        raise EngineUnavailable(url, reason) from None
    async with open_http_control(url, settings.api_key) as control:
        await control.wait_until_healthy(deadline_s)
        yield control


def _failed_with(kind: type[ConsumerError], outcome: object) -> bool:
    return isinstance(outcome, Failed) and outcome.error == kind.__name__
