"""Consumers of several virtual hosts in one process, their workers threads on GPUs of a fake CUDA.

All but the GPUs is real: routes, groups of gloo, blocks in /dev/shm, and a worker's end of device
lanes. A broadcast among workers copies memory once all of its members have queued it.
"""

from __future__ import annotations

import ctypes
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from tests.fake_cuda import FakeCuda
from tests.unit.planning.worlds import World
from tests.unit.transfer.blocks import Block, open_block
from tests.unit.transfer.reading import Held, ThreadEngine, shard_bytes, shard_key
from weightbus.consumers.errors import PeerLost, ProofNeeded, cause_of
from weightbus.consumers.planning.buckets import plan_buckets
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.transfer.broadcast import BroadcastRoute
from weightbus.consumers.transfer.device_lanes import DeviceFeed, DeviceLanes, DeviceStaging
from weightbus.consumers.transfer.fetch import LocalSegments
from weightbus.consumers.transfer.groups import Groups, open_meeting
from weightbus.consumers.transfer.lanes import StagingCache, leave_lanes
from weightbus.consumers.transfer.route import Transfer
from weightbus.consumers.transfer.segments import SegmentCache
from weightbus.consumers.transfer.sources import Sources
from weightbus.consumers.transfer.staged import Staging
from weightbus.consumers.transfer.staging import BlockPool
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.layout import Layout, ShardSpec
from weightbus.schemas.placement import FileSegment, Placement, Segment
from weightbus.schemas.rounds import EngineRoute, Group, Member, RankRoute, RoundPlan
from weightbus.schemas.worker import Feed, LaneFill, Prepared, Stream

__all__ = ("BUCKET_BYTES", "PATIENT_S", "DeviceFleet", "Site", "lost", "open_device_fleet")

ADDRESS = "127.0.0.1"
BUCKET_BYTES = 1024
DEADLINE_S = 60.0
PATIENT_S = 30.0
"""So long members wait for each other where none is lost: no machine is so slow."""
POLL_S = 1e-3

_allocating = threading.Lock()


class Ring:
    """One communicator, as all its members have it."""

    def __init__(self, size: int) -> None:
        self.size, self.place_count = size, 0
        self.broken = ""
        """Why; empty: it is not."""
        self.operations: list[Operation] = []
        self.lock = threading.Lock()


@dataclass(eq=False)
class Operation:
    """One broadcast."""

    root: int
    size_bytes: int
    addresses: dict[int, int] = field(default_factory=dict)
    """Place -> where its bytes are, or are to be."""
    done: bool = False


class ExchangeCuda(FakeCuda):
    """Events after a broadcast happen when all members have queued it."""

    def __init__(self, other: ExchangeCuda | None = None, devices: int = 1) -> None:
        super().__init__(devices, machine=None if other is None else other._machine)
        self.latest: dict[int, Operation] = {}
        """Stream -> the broadcast that was queued last."""
        self._after: dict[int, Operation] = {}

    def itself(self) -> FakeCuda:
        """As `OpenCuda`."""
        return self

    def allocate(self, device: int, size_bytes: int) -> int:
        with _allocating:
            return super().allocate(device, size_bytes)

    def open_handle(self, device: int, handle: bytes) -> int:
        with _allocating:
            return super().open_handle(device, handle)

    def record_event(self, device: int, stream: int) -> int:
        event = super().record_event(device, stream)
        if stream in self.latest:
            self._after[event] = self.latest[stream]
        return event

    def is_event_done(self, device: int, event: int) -> bool:
        operation = self._after.get(event)
        return super().is_event_done(device, event) and (operation is None or operation.done)


class RingMember:
    """As `Communicator`."""

    def __init__(
        self, ring: Ring, place: int, cuda: ExchangeCuda, group: str, rings: Rings
    ) -> None:
        self._ring, self._place, self._cuda, self._group = ring, place, cuda, group
        self._rings = rings
        self._queued = 0

    def broadcast(
        self,
        address: int,
        size_bytes: int,
        root: int,
        stream: int,
        *,
        check: Callable[[], None],
    ) -> None:
        self._rings.before()
        self.check()
        with self._ring.lock:
            if self._queued == len(self._ring.operations):
                self._ring.operations.append(Operation(root, size_bytes))
            operation = self._ring.operations[self._queued]
            self._queued += 1
            assert (operation.root, operation.size_bytes) == (root, size_bytes), "out of step"
            operation.addresses[self._place] = address
            self._cuda.latest[stream] = operation
            if len(operation.addresses) == self._ring.size:
                for place, other in operation.addresses.items():
                    if place != root:
                        ctypes.memmove(other, operation.addresses[root], size_bytes)
                operation.done = True

    def check(self) -> None:
        if self._ring.broken:
            raise PeerLost(self._group, ["another place"], self._ring.broken)


class Rings:
    """The communicators of one worker, as `Communicators`."""

    def __init__(self, meetings: dict[tuple[str, str, str], Ring], cuda: ExchangeCuda) -> None:
        self._meetings, self._cuda = meetings, cuda
        self._mine: dict[str, tuple[str, Ring, RingMember]] = {}
        """Group -> (key of the plan, ...)."""
        self.refusal: WeightBusError | None = None
        """Why this worker can have none."""
        self.before: Callable[[], None] = lambda: None
        """Called before a broadcast is queued."""

    def open_all(
        self, fills: Sequence[LaneFill], deadline_s: float, check: Callable[[], None]
    ) -> Sequence[RingMember]:
        return [self._open(fill, min(deadline_s, PATIENT_S), check) for fill in fills]

    def _open(self, fill: LaneFill, deadline_s: float, check: Callable[[], None]) -> RingMember:
        if self.refusal is not None:
            raise self.refusal
        known = self._mine.get(fill.group)
        if known is not None and known[0] == fill.key and not known[1].broken:
            return known[2]
        assert fill.rendezvous.startswith("tcp://"), "nobody knows where to meet"
        with _allocating:
            where = (fill.rendezvous, fill.group, fill.key)
            ring = self._meetings.setdefault(where, Ring(fill.size))
            ring.place_count += 1
        end = time.monotonic() + deadline_s
        while ring.place_count < fill.size:
            check()
            if time.monotonic() > end:
                ring.broken = f"place {fill.place} did not meet the others"
                raise PeerLost(fill.group, ["another place"], ring.broken)
            time.sleep(POLL_S)
        member = RingMember(ring, fill.place, self._cuda, fill.group, self)
        self._mine[fill.group] = (fill.key, ring, member)
        return member

    def drop(self, group: str) -> None:
        known = self._mine.pop(group, None)
        if known is not None:
            known[1].broken = known[1].broken or "a member has dropped it"
            for operation in known[1].operations:
                operation.done = True

    def wait_burials(self, deadline_s: float) -> int:
        return 0

    def close(self, deadline_s: float) -> int:
        for group in tuple(self._mine):
            self.drop(group)
        return 0


class DeviceEngine(ThreadEngine):
    """An engine whose ranks read device lanes, and fill some.

    Args:
        cudas: of every rank, a process of the host's machine each.
        first_device: of rank 0.
    """

    def __init__(
        self,
        layout: Layout,
        host_id: str,
        cudas: Sequence[ExchangeCuda],
        first_device: int,
        meetings: dict[tuple[str, str, str], Ring],
    ) -> None:
        super().__init__(layout, len(cudas))
        self.devices = [f"cuda:{first_device + rank}" for rank in range(len(cudas))]
        self.prepared = 0
        self._layout = layout
        self._blocks: list[StagingCache] = []
        self._segments: list[SegmentCache] = []
        self._staging: list[DeviceStaging] = []
        self.rings: list[Rings] = []
        """Of every rank."""
        for device, cuda in zip(self.devices, cudas, strict=True):
            self._blocks.append(StagingCache(device, cuda.itself))
            self._segments.append(SegmentCache(host_id, (), device, cuda.itself))
            self.rings.append(Rings(meetings, cuda))
            self._staging.append(DeviceStaging(device, cuda.itself, self.rings[-1]))

    def close(self) -> None:
        super().close()
        for rank in range(self.ranks):
            self._segments[rank].close()
            self._staging[rank].close()
            self._blocks[rank].close()

    async def prepare(
        self, layout_digest: str, feeds: Mapping[int, Feed], deadline_s: float
    ) -> tuple[Prepared, ...]:
        reasons: dict[int, str] = {}

        async def prepare(rank: int) -> None:
            reasons[rank] = await anyio.to_thread.run_sync(
                self._prepare, rank, feeds[rank], deadline_s
            )

        async with anyio.create_task_group() as tasks:
            for rank in feeds:
                tasks.start_soon(prepare, rank)
        return tuple(
            Prepared(request=0, rank=rank, ready=True, reason=reasons[rank]) for rank in feeds
        )

    def _prepare(self, rank: int, feed: Feed, deadline_s: float) -> str:
        """Why it could not be prepared."""
        if not isinstance(feed, Stream) or not feed.device:
            return ""
        budget = Deadline("prepare", deadline_s)
        try:
            with self._fed(rank, feed, budget) as fed:
                self._staging[rank].prepare(fed, budget)
        except WeightBusError as error:
            return f"{type(error).__name__}: {error}"
        self.prepared += 1
        return ""

    def _stream(self, rank: int, feed: Stream, budget: Deadline) -> Held:
        if not feed.device:
            return super()._stream(rank, feed, budget)
        held: Held = {}
        with self._fed(rank, feed, budget) as fed:
            shards: dict[int, list[ShardSpec]] = {}
            for shard in fed.plan.layout.shards:
                shards.setdefault(shard.segment // fed.plan.lanes, []).append(shard)
            try:
                with (
                    self._staging[rank].open_lanes(fed, budget) as lanes,
                    _serving_others(lanes),
                ):
                    for bucket in range(fed.plan.buckets):
                        lanes.wait_filled(bucket)
                        self.before(rank, bucket)
                        for shard in shards.get(bucket, ()):
                            begin = lanes.address(bucket, shard.segment % fed.plan.lanes)
                            size_bytes = shard_bytes(self._layout, shard)
                            data = ctypes.string_at(begin + shard.offset_bytes, size_bytes)
                            held[shard_key(shard)] = data
                        lanes.done(bucket)
            except BaseException:
                leave_lanes(fed.blocks, feed)
                raise
        return held

    @contextmanager
    def _fed(self, rank: int, feed: Stream, budget: Deadline) -> Iterator[DeviceFeed]:
        plan = plan_buckets(self._layout, feed.bucket_bytes, len(feed.lanes))
        sizes = tuple(segment.size_bytes for segment in self._layout.segments)
        opened = self._blocks[rank].open_all(feed.lanes, 0, feed.turn, budget, is_read=False)
        with opened as blocks:
            yield DeviceFeed(feed, blocks, plan, sizes, self._blocks[rank], self._segments[rank])


@contextmanager
def _serving_others(lanes: DeviceLanes) -> Iterator[None]:
    """As a worker does that finds that it cannot stream."""
    try:
        yield
    except ProofNeeded:
        lanes.serve()
        raise


@dataclass(eq=False, kw_only=True)
class Site:
    """One engine and its consumer's route."""

    name: str
    host: int
    engine: DeviceEngine
    pool: BlockPool
    staging: Staging
    route: BroadcastRoute
    groups: Groups
    pauses: int = 0


class DeviceFleet:
    """Made by `open_device_fleet`."""

    def __init__(self, world: World, model: str, slots: int) -> None:
        self.world, self.model, self.slots = world, model, slots
        self.sites: dict[str, Site] = {}
        self.blocks: list[list[Block]] = []
        """Of every host: the segments, each in a block of its shared memory."""
        self.files: dict[int, Path] = {}
        """Segments that hosts have as files instead."""

    def plan(
        self, version: int, *, groups_of: int | None = None, without: str = "", device: bool = True
    ) -> RoundPlan:
        """The broadcast of a version to every host; see `tests.integration.broadcast.fleet`."""
        sites = [site for site in self.sites.values() if site.name != without]
        hosts = [
            [
                Member(site.name, rank)
                for site in sites
                if site.host == host
                for rank in range(site.engine.ranks)
            ]
            for host in sorted({site.host for site in sites})
        ]
        lanes = [
            tuple(host[lane % len(host)] for host in hosts)
            for lane in range(max(len(host) for host in hosts))
        ]
        forms = groups_of is None and len(hosts) > 1
        return RoundPlan(
            model=self.model,
            version=version,
            round=f"v{version}",
            epoch=version,
            leader=sites[0].name,
            engines=tuple(
                EngineRoute(
                    engine=site.name,
                    ranks=tuple(
                        RankRoute(rank=rank, route="broadcast") for rank in range(site.engine.ranks)
                    ),
                )
                for site in sites
            ),
            groups=tuple(
                Group(
                    id=f"lane{number}-{groups_of or version}",
                    members=members,
                    rendezvous=self.sites[members[0].engine].route.rendezvous if forms else "",
                )
                for number, members in enumerate(lanes)
            ),
            bucket_bytes=BUCKET_BYTES,
            slots=self.slots,
            device=device,
        )

    def placement(self, host: int) -> Placement:
        def way(number: int) -> Segment:
            if number in self.files:
                return FileSegment(path=str(self.files[number]))
            return self.blocks[host][number].segment()

        return tuple((way(number),) for number in range(len(self.world.segments)))

    def stall_after(self, stall_s: float) -> None:
        """How long whoever takes part may stand still from now on."""
        for site in self.sites.values():
            site.staging.stall_s = stall_s

    async def run(self, plan: RoundPlan) -> dict[str, WeightBusError | None]:
        """All members of a plan run it, side by side. What came of it."""
        outcomes: dict[str, WeightBusError | None] = {}

        async def update(site: Site) -> None:
            outcomes[site.name] = await self.update(site, plan)

        async with anyio.create_task_group() as tasks:
            for part in plan.engines:
                tasks.start_soon(update, self.sites[part.engine])
        return outcomes

    async def update(self, site: Site, plan: RoundPlan) -> WeightBusError | None:
        async def pause() -> None:
            site.pauses += 1

        site.engine.held.clear()
        site.route.know_devices(site.engine.devices)
        transfer = Transfer(
            engine=site.engine,
            ranks=tuple(range(site.engine.ranks)),
            version=plan.version,
            layout=self.world.layout,
            layout_digest="d" * 64,
            placement=self.placement(site.host),
            plan=plan,
            begin_write=pause,
            deadline_s=DEADLINE_S,
            proven=True,
        )
        try:
            await site.route.transfer(transfer)
        except WeightBusError as error:
            return error
        return None


@contextmanager
def open_device_fleet(
    world: World,
    hosts: Sequence[Sequence[tuple[str, int]]],
    directory: Path,
    *,
    slots: int = 2,
    files: Sequence[int] = (),
) -> Iterator[DeviceFleet]:
    """
    Args:
        hosts: of every host its engines, with their ranks; every rank has a GPU.
        directory: for files.
        files: segments that lie there, and so are fetched by the consumers.
    """
    fleet = DeviceFleet(world, f"m{uuid.uuid4().hex[:8]}", slots)
    meetings: dict[tuple[str, str, str], Ring] = {}
    with ExitStack() as stack:
        for number in files:
            fleet.files[number] = directory / f"{number}.bin"
            fleet.files[number].write_bytes(world.segments[number].tobytes())
        machines = []
        for number, engines in enumerate(hosts):
            host_id = f"host-{number}"
            fleet.blocks.append(
                [
                    stack.enter_context(open_block(segment.tobytes(), host_id))
                    for segment in world.segments
                ]
            )
            machine = ExchangeCuda(devices=sum(ranks for _, ranks in engines))
            machines.append(machine)
            first = 0
            for name, ranks in engines:
                cudas = [ExchangeCuda(machine) for _ in range(ranks)]
                engine = DeviceEngine(world.layout, host_id, cudas, first, meetings)
                first += ranks
                pool = BlockPool(f"{fleet.model}.{name}", 2**22)
                groups = Groups(ADDRESS, form_s=PATIENT_S, operation_s=PATIENT_S)
                local = LocalSegments(host_id, [str(directory)])
                staging = Staging(pool, PATIENT_S)
                route = BroadcastRoute(
                    name,
                    Sources(local, host_id, [str(directory)]),
                    staging,
                    groups,
                    stack.enter_context(open_meeting(ADDRESS)),
                )
                fleet.sites[name] = Site(
                    name=name,
                    host=number,
                    engine=engine,
                    pool=pool,
                    staging=staging,
                    route=route,
                    groups=groups,
                )
                closes: tuple[Callable[[], object], ...]
                closes = (local.close, pool.close, partial(groups.close, 0.0), engine.close)
                for close in closes:
                    stack.callback(close)
        yield fleet
        stack.close()
        for machine in machines:  # an engine that ends frees slots that others have open yet
            machine.undefined[:] = [one for one in machine.undefined if "while open" not in one]
            machine.assert_clean()


def lost(error: WeightBusError | None) -> str:
    """The cause of a failure; empty: there is none."""
    return "" if error is None else cause_of(error)
