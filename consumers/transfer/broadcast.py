"""The route `broadcast`: all hosts together fetch every byte once, and all of them get it.

A host's lanes are blocks of staging, each filled by one of its consumers as a member of a process
group, and read by all workers of the host, whatever their engine. What a plan means for a host is
in `weightbus.consumers.planning.hosts`; the flow is that of every staged route.

Invariants: a group whose members may have got out of step is dropped at once, so that nobody waits
for it longer than he must; a block is left only when its group writes to it no more.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import ClassVar, Final

import anyio

from weightbus.consumers.errors import PeerLost
from weightbus.consumers.planning.hosts import HostShare, host_share, turn_of
from weightbus.consumers.transfer.alone import bring_alone
from weightbus.consumers.transfer.favour import Favour
from weightbus.consumers.transfer.fetch import Fetcher
from weightbus.consumers.transfer.groups import GlooExchange, Groups, Meeting
from weightbus.consumers.transfer.pipeline import Lane, Reader
from weightbus.consumers.transfer.route import Route, Transfer
from weightbus.consumers.transfer.sources import Sources
from weightbus.consumers.transfer.staged import (
    Clock,
    Staging,
    bring,
    bring_by_stream,
    open_blocks,
)
from weightbus.consumers.transfer.staging import BlockSpec, StagingBlock
from weightbus.schemas.base import RouteName
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import Placement, Segment
from weightbus.schemas.rounds import RoundPlan
from weightbus.schemas.worker import Applied

__all__ = ("BroadcastRoute",)

_logger = logging.getLogger(__name__)

GRAVE_POLL_S: Final = 0.02


class BroadcastRoute(Route):
    """Takes part in the groups of plans, for one engine.

    Args:
        engine: its id, by which plans name it.
        groups: of this process.
        meeting: where groups meet whose first member is this engine.
    """

    name: ClassVar[RouteName] = "broadcast"

    def __init__(
        self, engine: str, sources: Sources, staging: Staging, groups: Groups, meeting: Meeting
    ) -> None:
        self._engine = engine
        self._sources, self._staging = sources, staging
        self._groups, self._favour = groups, Favour()
        self.rendezvous = meeting.rendezvous

    @property
    def groups(self) -> tuple[str, ...]:
        return self._groups.ids

    @property
    def room_bytes(self) -> int:
        return self._staging.pool.room_bytes

    def is_favoured(self, version: int) -> bool:
        return self._favour.allows(version)

    def widen(
        self, ready: CheckpointReady, layout_digest: str, layout: Layout, placement: Placement
    ) -> Placement:
        return self._sources.widen(ready, layout_digest, layout, placement)

    def reach(self, layout: Layout, placement: Placement) -> Sequence[Segment]:
        return self._sources.reach(self.name, layout, placement)

    async def transfer(self, transfer: Transfer) -> tuple[Applied, ...]:
        clock = Clock("broadcast", transfer.deadline_s)
        share = host_share(transfer.plan, self._engine)
        ways = await self.reach_in_time(transfer, "fetch", clock.left_s())

        async with self._sources.open(transfer, ways, clock.left_s()) as fetcher:

            async def by_stream(left_s: float) -> tuple[Applied, ...]:
                return await self._stream(transfer, fetcher, share, left_s)

            async def by_relay(left_s: float) -> tuple[Applied, ...]:
                alone = replace(transfer, proven=False)
                return await bring_alone(alone, fetcher, self._staging, left_s)

            return await bring(transfer, by_stream, by_relay, clock.left_s())

    async def _stream(
        self, transfer: Transfer, fetcher: Fetcher, share: HostShare, deadline_s: float
    ) -> tuple[Applied, ...]:
        clock, plan = Clock("broadcast", deadline_s), transfer.plan
        buckets = await self._staging.plan(transfer, plan.bucket_bytes, len(share.names))
        exchanges: list[GlooExchange] = []
        lanes: list[Lane] = []
        try:
            async with self._open_blocks(transfer, fetcher, share, exchanges, clock) as blocks:
                exchanges.extend(await self._meet(share, plan, clock))
                lanes.extend(
                    Lane(number=owned.number, block=block, rank=owned.rank, exchange=exchange)
                    for owned, block, exchange in zip(share.owned, blocks, exchanges, strict=True)
                )
                return await bring_by_stream(
                    transfer,
                    fetcher,
                    buckets,
                    lanes,
                    share.names,
                    self._readers(share),
                    turn=turn_of(plan),
                    stall_s=self._staging.stall_s,
                    deadline_s=clock.left_s(),
                    leave=partial(self._leave, share),
                )
        finally:
            if not lanes or any(lane.filled < buckets.buckets for lane in lanes):
                self._leave(share)

    def _leave(self, share: HostShare) -> None:
        """Drop the groups of a plan: whoever waits for this member sees it soon."""
        self._groups.drop_nowait(owned.group.id for owned in share.owned)

    async def _meet(
        self, share: HostShare, plan: RoundPlan, clock: Clock
    ) -> tuple[GlooExchange, ...]:
        """The groups of a plan; that they do not meet is remembered.

        Raises:
            PeerLost, DeadlineExceeded: as `Groups.open_all`.
        """
        members = [(lane.group, share.place) for lane in share.owned]
        forming = [group for group, _ in members if group.rendezvous and len(group.members) > 1]
        key = f"{plan.round}/{plan.epoch}/{plan.created_ns}"
        try:
            exchanges = await self._groups.open_all(members, key, clock.left_s())
        except PeerLost as error:
            if forming:
                left_out = self._favour.missed(plan.version)
                _logger.warning(
                    "the next %d versions come without a broadcast, since a group did not form at "
                    "%s; can all its hosts reach the --address %s of this one, and it theirs? %s",
                    left_out,
                    forming[0].rendezvous,
                    self._groups.address,
                    error,
                )
            raise
        if forming:
            self._favour.met()
        return exchanges

    @asynccontextmanager
    async def _open_blocks(
        self,
        transfer: Transfer,
        fetcher: Fetcher,
        share: HostShare,
        exchanges: Sequence[GlooExchange],
        clock: Clock,
    ) -> AsyncIterator[tuple[StagingBlock, ...]]:
        """Those of the lanes that are owned here. While a group is being buried its blocks take
        room still: that is waited for before the other members are met, who would wait, too.

        Raises:
            As `open_blocks`.

        Args:
            exchanges: of these blocks; they may come later.
        """
        plan, pool = transfer.plan, self._staging.pool
        specs = [
            BlockSpec(share.names[lane.number], plan.slots, plan.bucket_bytes)
            for lane in share.owned
        ]
        needed_bytes = sum(spec.size_bytes for spec in specs)
        while self._groups.burials and pool.room_bytes < needed_bytes:
            clock.left_s()
            await anyio.sleep(GRAVE_POLL_S)
        async with open_blocks(
            pool, specs, fetcher, lambda: any(exchange.writing() for exchange in exchanges)
        ) as blocks:
            yield blocks

    def _readers(self, share: HostShare) -> list[Reader]:
        return [
            Reader(f"{member.engine}/{member.rank}", member.rank, member.engine == self._engine)
            for member in share.readers
        ]
