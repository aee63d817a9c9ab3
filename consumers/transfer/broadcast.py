"""The route `broadcast`: all hosts together fetch every byte once, and all of them get it.

A host's lanes are blocks of staging, each filled by one of its consumers as a member of a process
group, and read by all workers of the host, whatever their engine. What a plan means for a host is
in `weightbus.consumers.planning.hosts`; the flow is that of every staged route. Where all ranks of
a plan are on GPUs, its lanes lie there, and the workers fill them and broadcast among each other:
the process groups carry roll calls only.

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

from weightbus.consumers.errors import (
    ApplyFailed,
    PeerLost,
    ProofNeeded,
    RouteUnavailable,
    SegmentUnavailable,
    TornRead,
)
from weightbus.consumers.planning.hosts import HostShare, host_share, turn_of
from weightbus.consumers.transfer.alone import bring_alone
from weightbus.consumers.transfer.favour import Favour
from weightbus.consumers.transfer.fetch import Fetcher
from weightbus.consumers.transfer.filling import Filling
from weightbus.consumers.transfer.gpu import is_gpu
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
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import CudaSegment, Placement, Segment
from weightbus.schemas.rounds import Group, RoundPlan
from weightbus.schemas.worker import Applied, LaneFill

__all__ = ("BroadcastRoute",)

_logger = logging.getLogger(__name__)

GRAVE_POLL_S: Final = 0.02

_NOT_OF_SHARING: Final = frozenset({PeerLost.__name__, ProofNeeded.__name__, TornRead.__name__})
"""What a worker says that would have failed in place, too, or whose neighbour failed."""


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
        self._devices: tuple[str, ...] = ()
        self._reads_gpus = True
        """Whether the ranks could open the memory of GPUs that they were to read."""
        self._met_at: dict[str, str] = {}
        """Group that is ready -> where its members have met."""
        self.rendezvous = meeting.rendezvous

    @property
    def groups(self) -> tuple[str, ...]:
        return self._groups.ids

    @property
    def room_bytes(self) -> int:
        return self._staging.pool.room_bytes

    def is_favoured(self, version: int) -> bool:
        return self._favour.allows(version)

    def know_devices(self, devices: Sequence[str]) -> None:
        if tuple(devices) != self._devices:
            self._devices, self._reads_gpus = tuple(devices), True

    def widen(
        self, ready: CheckpointReady, layout_digest: str, layout: Layout, placement: Placement
    ) -> Placement:
        return self._sources.widen(ready, layout_digest, layout, placement)

    def reach(self, layout: Layout, placement: Placement) -> Sequence[Segment]:
        return self._sources.reach(self.name, layout, placement)

    async def transfer(self, transfer: Transfer) -> tuple[Applied, ...]:
        clock = Clock("broadcast", transfer.deadline_s)
        share = host_share(transfer.plan, self._engine)
        if transfer.plan.device and not all(map(is_gpu, self._devices)):
            raise RouteUnavailable(self.name, "its lanes are on GPUs, and not all ranks here are")
        ways = await self.reach_in_time(transfer, "fetch", clock.left_s())

        async with self._sources.open(transfer, ways, clock.left_s()) as fetcher:

            async def by_stream(left_s: float) -> tuple[Applied, ...]:
                if not transfer.plan.device:
                    return await self._stream(transfer, fetcher, share, None, left_s)
                device = self._filling(transfer, ways, share)
                return await self._stream(transfer, fetcher, share, device, left_s)

            async def by_relay(left_s: float) -> tuple[Applied, ...]:
                alone = replace(transfer, proven=False)
                return await bring_alone(alone, fetcher, self._staging, left_s)

            return await bring(transfer, by_stream, by_relay, clock.left_s())

    async def _stream(
        self,
        transfer: Transfer,
        fetcher: Fetcher,
        share: HostShare,
        device: Filling | None,
        deadline_s: float,
    ) -> tuple[Applied, ...]:
        clock, plan = Clock("broadcast", deadline_s), transfer.plan
        buckets = await self._staging.plan(transfer, plan.bucket_bytes, len(share.names))
        exchanges: list[GlooExchange] = []
        lanes: list[Lane] = []
        slots = plan.slots if device is None or device.brought else 0
        specs = [
            BlockSpec(share.names[own.number], slots, plan.bucket_bytes) for own in share.owned
        ]
        try:
            async with self._open_blocks(specs, fetcher, exchanges, clock) as blocks:
                exchanges.extend(await self._meet(share, plan, clock))
                lanes.extend(
                    Lane(number=owned.number, block=block, rank=owned.rank, exchange=exchange)
                    for owned, block, exchange in zip(share.owned, blocks, exchanges, strict=True)
                )
                applied = await bring_by_stream(
                    transfer,
                    fetcher,
                    buckets,
                    lanes,
                    share.names,
                    self._readers(share),
                    turn=turn_of(plan),
                    stall_s=self._staging.stall_s,
                    deadline_s=clock.left_s(),
                    device=device,
                    leave=partial(self._leave, share),
                )
            if device is not None:
                self._favour.met()
            return applied
        except WeightBusError as error:
            if device is not None:
                self._learn(plan, device, error, begun=any(lane.filled for lane in lanes))
            raise
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
        forming = _forming(plan)
        try:
            exchanges = await self._groups.open_all(members, _key_of(plan), clock.left_s())
        except PeerLost as error:
            if forming:
                self._miss(plan, forming[0].rendezvous, error)
            raise
        if forming and not plan.device:
            self._favour.met()
        return exchanges

    def _miss(self, plan: RoundPlan, rendezvous: str, error: WeightBusError) -> None:
        _logger.warning(
            "the next %d versions come without a broadcast, since a group did not form at "
            "%s; can all its hosts reach the --address %s of this one, and it theirs? %s",
            self._favour.missed(plan.version),
            rendezvous,
            self._groups.address,
            error,
        )

    @asynccontextmanager
    async def _open_blocks(
        self,
        specs: Sequence[BlockSpec],
        fetcher: Fetcher,
        exchanges: Sequence[GlooExchange],
        clock: Clock,
    ) -> AsyncIterator[tuple[StagingBlock, ...]]:
        """Those of the lanes that are owned here. While a group is being buried its blocks take
        room still: that is waited for before the other members are met, who would wait, too.

        Raises:
            As `open_blocks`.

        Args:
            specs: of the blocks.
            exchanges: of these blocks; they may come later.
        """
        pool = self._staging.pool
        needed_bytes = sum(spec.size_bytes for spec in specs)
        while self._groups.burials and pool.room_bytes < needed_bytes:
            clock.left_s()
            await anyio.sleep(GRAVE_POLL_S)
        async with open_blocks(
            pool, specs, fetcher, lambda: any(exchange.writing() for exchange in exchanges)
        ) as blocks:
            yield blocks

    def _filling(self, transfer: Transfer, ways: Sequence[Segment], share: HostShare) -> Filling:
        """How the lanes of a plan are filled on this host."""
        plan = transfer.plan
        self._remember_meetings(share)
        fills: dict[int, tuple[LaneFill, ...]] = {}
        for lane in share.owned:
            group = lane.group
            fill = LaneFill(
                lane=lane.number,
                number=lane.number,
                place=share.place,
                size=len(group.members),
                group=group.id,
                rendezvous=self._met_at.get(group.id, ""),
                key=_key_of(plan),
            )
            fills[lane.rank] = (*fills.get(lane.rank, ()), fill)
        sources = self._sources.of_workers(transfer.placement, ways, gpus=self._reads_gpus)
        return Filling(slots=plan.slots, sources=sources, fills=fills)

    def _remember_meetings(self, share: HostShare) -> None:
        """Workers meet before every plan; who has met before is not told again where."""
        groups = {lane.group.id: lane.group.rendezvous for lane in share.owned}
        kept = {*self._groups.ids, *groups}
        self._met_at = {name: where for name, where in self._met_at.items() if name in kept}
        self._met_at |= {name: where for name, where in groups.items() if where}

    def _learn(
        self, plan: RoundPlan, device: Filling, error: WeightBusError, *, begun: bool
    ) -> None:
        """What a worker could not do is not asked of it again at once."""
        failure = error.__cause__ if isinstance(error.__cause__, ApplyFailed) else error
        if not isinstance(failure, ApplyFailed):
            return
        forming = _forming(plan)
        of_neighbour = isinstance(error, PeerLost)  # what it missed is not a segment, but a lane
        on_gpus = any(isinstance(source, CudaSegment) for source in device.sources)
        missed_segment = failure.cause == SegmentUnavailable.__name__ and not of_neighbour
        if failure.cause == PeerLost.__name__ and forming and not begun:
            self._miss(plan, forming[0].rendezvous, error)
        elif missed_segment and on_gpus and self._reads_gpus:
            _logger.warning("memory of GPUs is not read, but what is offered beside it: %s", error)
            self._reads_gpus = False
        elif failure.cause not in _NOT_OF_SHARING and (self._is_alone(plan) or not begun):
            _logger.warning(
                "the next %d versions are not shared with other engines: %s",
                self._favour.missed(plan.version),
                error,
            )

    @staticmethod
    def _is_alone(plan: RoundPlan) -> bool:
        """Whether no other host takes part."""
        return all(len(group.members) == 1 for group in plan.groups)

    def _readers(self, share: HostShare) -> list[Reader]:
        return [
            Reader(f"{member.engine}/{member.rank}", member.rank, member.engine == self._engine)
            for member in share.readers
        ]


def _key_of(plan: RoundPlan) -> str:
    """What only its members know."""
    return f"{plan.round}/{plan.epoch}/{plan.created_ns}"


def _forming(plan: RoundPlan) -> list[Group]:
    """The groups of a plan that have not met before."""
    return [group for group in plan.groups if group.rendezvous and len(group.members) > 1]
