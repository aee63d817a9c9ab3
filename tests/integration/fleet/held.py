"""An engine that stops at a moment that a test has chosen, so that it knows exactly where it is.

A decorator of a real `Engine`: it changes nothing but when a call goes on, and, on a host whose
wall clock is not that of the machine, the times that it tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import anyio
from msgspec import structs

from weightbus.consumers.engines.engine import Engine, EngineReport, TokenSeen
from weightbus.schemas.base import BucketTiming
from weightbus.schemas.worker import (
    Applied,
    Attached,
    Cell,
    Described,
    Feed,
    Inspected,
    Prepared,
    StageTiming,
)

__all__ = ("Hold", "HeldEngine", "Moment")

Moment = Literal["before_describe", "before_pause", "before_apply", "after_apply", "before_resume"]


class Hold:
    """One stop: whatever comes there waits until `release`."""

    def __init__(self, moment: Moment) -> None:
        self.moment = moment
        self.reached = anyio.Event()
        """Something has come there."""
        self.released = anyio.Event()

    def release(self) -> None:
        self.released.set()

    async def stop_here(self) -> None:
        self.reached.set()
        await self.released.wait()


class HeldEngine(Engine):
    """See `Engine`; `hold` makes every call that comes to a moment stop there."""

    kind = "held"

    def __init__(self, engine: Engine, skew_ns: int = 0) -> None:
        """`skew_ns`: by how much the clock that it times by is ahead."""
        self._engine, self._skew_ns = engine, skew_ns
        self._holds: list[Hold] = []

    def hold(self, moment: Moment) -> Hold:
        """Stop there, from now on until it is released."""
        hold = Hold(moment)
        self._holds.append(hold)
        return hold

    async def _pass(self, moment: Moment) -> None:
        for hold in self._holds:
            if hold.moment == moment and not hold.released.is_set():
                await hold.stop_here()

    @property
    def ranks(self) -> int:
        return self._engine.ranks

    async def describe(
        self, layout_digest: str, layout: bytes, deadline_s: float
    ) -> tuple[Described, ...]:
        await self._pass("before_describe")
        return await self._engine.describe(layout_digest, layout, deadline_s)

    async def attach(
        self,
        layout_digest: str,
        needs_digests: Sequence[str],
        cells: Sequence[Sequence[Cell]],
        deadline_s: float,
    ) -> tuple[Attached, ...]:
        return await self._engine.attach(layout_digest, needs_digests, cells, deadline_s)

    async def prepare(
        self, layout_digest: str, feeds: Mapping[int, Feed], deadline_s: float
    ) -> tuple[Prepared, ...]:
        return await self._engine.prepare(layout_digest, feeds, deadline_s)

    async def pause(self, deadline_s: float) -> None:
        await self._pass("before_pause")
        await self._engine.pause(deadline_s)

    async def apply(
        self,
        version: int,
        layout_digest: str,
        feeds: Mapping[int, Feed],
        deadline_s: float,
    ) -> tuple[Applied, ...]:
        await self._pass("before_apply")
        applied = await self._engine.apply(version, layout_digest, feeds, deadline_s)
        await self._pass("after_apply")
        return tuple(
            structs.replace(one, stages=tuple(self._skewed(stage) for stage in one.stages))
            for one in applied
        )

    def _skewed(self, timing: StageTiming) -> StageTiming:
        return structs.replace(
            timing,
            start_ns=timing.start_ns + self._skew_ns,
            end_ns=timing.end_ns + self._skew_ns,
            buckets=tuple(
                BucketTiming(b.start_ns + self._skew_ns, b.end_ns + self._skew_ns, b.bytes)
                for b in timing.buckets
            ),
        )

    async def inspect(self, layout_digest: str | None, deadline_s: float) -> tuple[Inspected, ...]:
        return await self._engine.inspect(layout_digest, deadline_s)

    async def resume(self, version: int, deadline_s: float) -> None:
        await self._pass("before_resume")
        await self._engine.resume(version, deadline_s)

    async def first_token(self, version: int, deadline_s: float) -> TokenSeen | None:
        seen = await self._engine.first_token(version, deadline_s)
        return seen and structs.replace(seen, at_ns=seen.at_ns + self._skew_ns)

    async def state(self, deadline_s: float) -> EngineReport:
        return await self._engine.state(deadline_s)
