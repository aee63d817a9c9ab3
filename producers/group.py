"""How the ranks of one trainer agree on a version: every rank says its part, rank 0 seals.

Only parts that are said while a rank is inside `publish` count; nothing old is ever taken for new.
Rank 0 calls by saying its own part, and again every second; every other rank says its part when it
begins and whenever it hears the call, until it hears `CheckpointReady`. A rank that gives up says
so, and why, and no other waits for it, not even one that begins later: what was given up since this
rank's publisher was opened is read back. A version is tried once, so there is no older try to
mistake it for. Parts of different steps of training are never sealed. Rank 0 hears all ranks and
the others hear rank 0, who passes bad news on: what is heard grows with their number, not with its
square. A version that one rank skips is skipped by all, in the same way. Every wait has one
deadline.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any

import anyio
from msgspec import structs

from weightbus.bus.received import Received, Reconnected
from weightbus.producers.announcing import Announcer
from weightbus.producers.errors import SealFailed, VersionSkipped
from weightbus.schemas.checkpoint import CheckpointPart, CheckpointReady
from weightbus.schemas.errors import WeightBusError
from weightbus.tracing.context import SpanRef

__all__ = ("RankGroup",)

CALL_INTERVAL_S = 1.0
GIVE_UP_TIMEOUT_S = 2.0
FOLLOWERS_LONGER_S = 2.0
"""Rank 0 gives up first, and tells the others who is missing."""
MISSING_NAMED = 16
NO_LAYOUT = "0" * 64
"""Of a part that is given up before its layout is stored."""
STEP_CHARACTERS = 128
"""Limit of `CheckpointPart.step`."""
REASON_CHARACTERS = 4096
"""Limit of `schemas.base.Reason`."""
SKIPPED = f"{VersionSkipped.__name__}: "
"""How the `error` of a part begins that is given up because the version is skipped; those of others
begin with the name of their class, too."""


class RankGroup:
    """One rank's view of its trainer's ranks."""

    def __init__(self, announcer: Announcer, rank: int, world_size: int, timeout_s: float) -> None:
        self._bus, self._model, self._producer = announcer.bus, announcer.model, announcer.producer
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._since_ns = 0
        """By the server's clock; no part of this run is older."""
        self._elsewhere: dict[int, int] = {}
        """The newest other version that was heard of a rank while this one waits for its part."""
        self.headers: Mapping[str, str] = {}
        """Of every part that this rank says: they name the span that it is published in."""
        self.spans: dict[int, SpanRef] = {}
        """Rank -> the span in which its part, that was gathered, is published."""

    def draft(self, ready: CheckpointReady, step: str = "") -> CheckpointPart:
        """What this rank says of its part of a version, before it has one."""
        return CheckpointPart(
            model=self._model,
            version=ready.version,
            producer=self._producer,
            rank=self._rank,
            world_size=self._world_size,
            layout_digest=NO_LAYOUT,
            placement=(),
            created_ns=ready.created_ns,
            step=step[:STEP_CHARACTERS],
        )

    async def open(self) -> None:
        """What the bus holds by now is of an earlier run."""
        async for old in self._stored():
            self._since_ns = max(self._since_ns, old.received_ns + 1)

    async def gather(self, mine: CheckpointPart) -> Sequence[CheckpointPart]:
        """On rank 0: the parts of all ranks, in rank order.

        Raises:
            SealFailed: a rank gave up, was started differently, or was not heard in time.
            VersionSkipped: a rank has skipped it.
        """
        parts = {mine.rank: mine}
        self._elsewhere, self.spans = {}, {}
        with anyio.move_on_after(self._timeout_s):
            async with self._bus.subscribe(CheckpointPart, model=mine.model) as messages:
                missed = True
                while len(parts) < self._world_size:
                    if missed:
                        await self._look_back(mine)
                        missed = False
                    await self._bus.publish(mine, self.headers)
                    with anyio.move_on_after(CALL_INTERVAL_S):
                        while len(parts) < self._world_size:
                            heard = await anext(messages)
                            if isinstance(heard, Reconnected):
                                missed = True
                                break
                            if self._is_of(heard.message, mine):
                                parts[heard.message.rank] = heard.message
                                if (span := SpanRef.from_headers(heard.headers)) is not None:
                                    self.spans[heard.message.rank] = span
        if len(parts) < self._world_size:
            missing, named = self._not_heard(parts)
            reason = f"after {self._timeout_s:g} s there is no part of {named}"
            raise SealFailed(mine.version, reason + self._told_of(missing), missing)
        return [parts[rank] for rank in range(self._world_size)]

    async def follow(self, mine: CheckpointPart) -> CheckpointReady:
        """On every other rank: what rank 0 made of the parts.

        Raises:
            SealFailed: a rank gave up, was started differently, or rank 0 did not seal in time.
            VersionSkipped: a rank has skipped it.
        """
        timeout_s = self._timeout_s + FOLLOWERS_LONGER_S
        called = False
        self._elsewhere = {}
        with anyio.move_on_after(timeout_s):
            async with self._bus.subscribe(
                CheckpointPart, CheckpointReady, model=mine.model, producer=mine.producer, rank=0
            ) as messages:
                await self._bus.publish(mine, self.headers)
                await self._look_back(mine)
                async for heard in messages:
                    if isinstance(heard, Reconnected):
                        ready = await self._sealed(mine)
                        if ready is not None:
                            return ready
                        await self._look_back(mine)
                        await self._bus.publish(mine, self.headers)
                    elif isinstance(heard.message, CheckpointReady):
                        if _is_sealed(heard.message, mine):
                            return heard.message
                    elif isinstance(heard.message, CheckpointPart) and self._is_of(
                        heard.message, mine
                    ):
                        called = True
                        await self._bus.publish(mine, self.headers)
                    elif self._elsewhere:  # rank 0 hears why it waits in vain
                        await self._bus.publish(mine, self.headers)
        reason = f"after {timeout_s:g} s rank 0 has not done so"
        unheard = "" if called else self._told_of([0]) or "; nothing was heard of it"
        raise SealFailed(mine.version, reason + unheard, () if called else (0,))

    async def give_up(self, mine: CheckpointPart, error: BaseException) -> None:
        """Tell the other ranks that they wait in vain. Best effort: the error is on its way up."""
        reason = f"{type(error).__name__}: {error}"
        if not isinstance(error, Exception):
            reason = "its publisher has ended"
        if isinstance(error, VersionSkipped):
            by = "" if error.rank is None else f"rank {error.rank}, "
            reason = f"{SKIPPED}{by}{error.reason}"
        reason = reason[:REASON_CHARACTERS]
        with anyio.move_on_after(GIVE_UP_TIMEOUT_S, shield=True):
            try:
                await self._bus.publish(structs.replace(mine, error=reason), self.headers)
            except WeightBusError:
                return

    async def unheard(self, version: int, producer: str) -> tuple[int, ...]:
        """On rank 0: the other ranks that have said nothing yet of a version, good or bad.

        Raises:
            BusUnavailable, BusTimeout, RequestRefused
        """
        heard = {self._rank}
        async for part in self._stored():
            if (part.message.version, part.message.producer) == (version, producer):
                heard.add(part.message.rank)
        return tuple(rank for rank in range(self._world_size) if rank not in heard)

    async def rank_0_has_ended(self, mine: CheckpointPart) -> bool:
        """On every other rank: whether rank 0 has given the version up, or announced it.

        Raises:
            BusUnavailable, BusTimeout, RequestRefused
        """
        last = await self._bus.last(
            CheckpointPart, model=self._model, producer=self._producer, rank=0
        )
        if last is not None and last.message.version == mine.version and last.message.error:
            return True
        return await self._sealed(mine) is not None

    async def _look_back(self, mine: CheckpointPart) -> None:
        """
        Raises:
            SealFailed, VersionSkipped: a rank has given up before this one listened.
        """
        async for part in self._stored():
            if part.message.error and part.message.version == mine.version:
                self._is_of(part.message, mine)

    def _stored(self) -> AsyncIterator[Received[CheckpointPart]]:
        """Parts of this run that may bear bad news: rank 0 looks at all, and tells the others."""
        tokens: dict[str, Any] = {"producer": self._producer}
        if self._rank != 0:
            tokens["rank"] = 0
        return self._bus.replay(
            CheckpointPart, model=self._model, since_ns=self._since_ns, **tokens
        )

    async def _sealed(self, mine: CheckpointPart) -> CheckpointReady | None:
        last = await self._bus.last(CheckpointReady, model=mine.model)
        return last.message if last is not None and _is_sealed(last.message, mine) else None

    def _is_of(self, part: CheckpointPart, mine: CheckpointPart) -> bool:
        """Whether `part` is another rank's of the same version; if it bears bad news, raises."""
        if part.producer != mine.producer or part.rank == mine.rank:
            return False
        if part.version != mine.version:
            newest = max(part.version, self._elsewhere.get(part.rank, part.version))
            self._elsewhere[part.rank] = newest
            return False
        if part.world_size != self._world_size:
            reason = f"rank {part.rank} is one of {part.world_size} ranks, rank {mine.rank} one of"
            raise SealFailed(mine.version, f"{reason} {self._world_size}")
        if part.error.startswith(SKIPPED):
            raise VersionSkipped(mine.version, part.error.removeprefix(SKIPPED), part.rank)
        if part.error:
            raise SealFailed(mine.version, f"rank {part.rank} gave up: {part.error}")
        if part.step and mine.step and part.step != mine.step:
            reason = f"rank {part.rank} is at step {part.step}, rank {mine.rank} at {mine.step}"
            raise SealFailed(mine.version, reason)
        return True

    def _told_of(self, missing: Collection[int]) -> str:
        """Where ranks are that were heard of, but not with the version that this one waits for."""
        elsewhere = [rank for rank in missing if rank in self._elsewhere][:MISSING_NAMED]
        said = [f"rank {rank} is at version {self._elsewhere[rank]}" for rank in elsewhere]
        return "; " + ", ".join(said) if said else ""

    def _not_heard(self, heard: Collection[int]) -> tuple[list[int], str]:
        missing = [rank for rank in range(self._world_size) if rank not in heard]
        more = f" and {len(missing) - MISSING_NAMED} more" if len(missing) > MISSING_NAMED else ""
        return missing, "ranks " + ", ".join(map(str, missing[:MISSING_NAMED])) + more


def _is_sealed(ready: CheckpointReady, mine: CheckpointPart) -> bool:
    return (ready.producer, ready.version) == (mine.producer, mine.version)
