"""Engines that follow one trainer together, as their consumers would have them do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import anyio

from tests.integration.routes.engine import DEADLINE_S, InProcessEngine
from tests.integration.routes.model import make_tensors
from tests.integration.routes.worlds import Site, World
from tests.unit.transfer.publishing import weights_digest
from weightbus.consumers.errors import cause_of
from weightbus.consumers.transfer.route import Route, Transfer
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.placement import Placement
from weightbus.schemas.rounds import RoundPlan
from weightbus.schemas.worker import Applied

__all__ = ("Fleet", "Outcome", "causes", "until")

Outcome = tuple[Applied, ...] | WeightBusError | None
"""What came of one engine's transfer; None: it was cancelled."""

Pauses = Mapping[str, Callable[[], Awaitable[None]]]
"""Engine -> what is done instead of pausing it."""


class Fleet:
    """The first engine is the one under test; what it needs to go on, the others are."""

    def __init__(self, world: World, sites: Sequence[Site]) -> None:
        self.world, self.sites = world, tuple(sites)
        self._scopes: dict[str, anyio.CancelScope] = {}

    @classmethod
    def of(cls, world: World, *ranks: int) -> Fleet:
        """New engines of so many ranks each."""
        return cls(world, world.sites_of(ranks))

    @property
    def engines(self) -> list[InProcessEngine]:
        return [site.engine for site in self.sites]

    @property
    def engine(self) -> InProcessEngine:
        """The one under test."""
        return self.sites[0].engine

    @property
    def route(self) -> Route:
        return self.sites[0].route

    def publish(self, version: int) -> Placement:
        return self.world.publish(make_tensors(version), version)

    async def update(self, version: int) -> list[tuple[Applied, ...]]:
        """Publish and bring a version; it must arrive everywhere, bit by bit, and be proven."""
        return self.check(version, await self.bring(version, self.publish(version)))

    def check(self, version: int, outcomes: Sequence[Outcome]) -> list[tuple[Applied, ...]]:
        """The version has arrived everywhere, bit by bit, and is proven."""
        tensors, replies = make_tensors(version), []
        for engine, applied in zip(self.engines, outcomes, strict=True):
            if isinstance(applied, WeightBusError):
                raise applied
            assert applied is not None, engine.name
            assert [(reply.rank, reply.version) for reply in applied] == [
                (rank, version) for rank in range(engine.ranks)
            ]
            verdict = engine.verdict(self.world.trainer, applied, weights_digest(tensors))
            assert verdict.ok, f"{engine.name}: {verdict.reason}"
            engine.check(tensors)
            replies.append(applied)
        return replies

    async def bring(
        self,
        version: int,
        placement: Placement,
        *,
        deadline_s: float = DEADLINE_S,
        pauses: Pauses = MappingProxyType({}),
        ranks: Sequence[int] | None = None,
    ) -> list[Outcome]:
        """Prepare and transfer, all engines at once, as their consumers do.

        Args:
            ranks: which alone are written; None: all.
        """
        proven = []
        for engine in self.engines:
            await engine.attach_to(self.world.trainer)
            proven.append(await self._is_proven(engine))
        plans = self.world.plan(self.sites, proven, version)
        outcomes: dict[str, Outcome] = {}

        async def bring(number: int) -> None:
            engine, (route, plan) = self.engines[number], plans[number]
            transfer = self._transfer(
                engine,
                plan,
                placement=placement,
                deadline_s=deadline_s,
                begin_write=pauses.get(engine.name, lambda: engine.pause(DEADLINE_S)),
                proven=proven[number],
                ranks=tuple(range(engine.ranks)) if ranks is None else tuple(ranks),
            )
            outcomes[engine.name] = None
            with anyio.CancelScope() as self._scopes[engine.name]:
                try:
                    outcomes[engine.name] = await route.transfer(transfer)
                except WeightBusError as error:
                    outcomes[engine.name] = error

        async with anyio.create_task_group() as tasks:
            for number in range(len(self.sites)):
                tasks.start_soon(bring, number)
        return [outcomes[engine.name] for engine in self.engines]

    def leave(self, name: str) -> None:
        """Cancel one engine's share of what `bring` does."""
        self._scopes[name].cancel()

    async def check_untouched(self, version: int) -> None:
        """Every engine still serves what it did."""
        for engine in self.engines:
            engine.check(make_tensors(version))
            for reply in await engine.inspect(None, DEADLINE_S):
                assert (reply.version, reply.touched) == (version, False), engine.name

    async def check_no_mix(self, *versions: int) -> None:
        """Every rank holds one of these versions whole, or says that it does not, or has none."""
        for engine in self.engines:
            for reply in await engine.inspect(None, DEADLINE_S):
                if not reply.touched and reply.version >= 0:
                    assert reply.version in versions, engine.name
                    engine.check_rank(make_tensors(reply.version), reply.rank)

    async def _is_proven(self, engine: InProcessEngine) -> bool:
        ranks = await engine.inspect(None, DEADLINE_S)
        return all(self.world.trainer.layout_digest in rank.proven for rank in ranks)

    def _transfer(self, engine: InProcessEngine, plan: RoundPlan, **others: Any) -> Transfer:
        return Transfer(
            engine=engine,
            version=plan.version,
            layout=self.world.trainer.layout,
            layout_digest=self.world.trainer.layout_digest,
            plan=plan,
            **others,
        )


def causes(outcomes: Sequence[Outcome]) -> list[str]:
    """Of every engine, what was at fault; empty: nothing, or it was cancelled."""
    return [cause_of(one) if isinstance(one, WeightBusError) else "" for one in outcomes]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what threads bring about."""
    with anyio.fail_after(DEADLINE_S):
        while True:
            if condition():
                return
            await anyio.sleep(0.001)
