"""Hosts whose workers fill and read device lanes, each in a thread, and the owners of the lanes.

A host has its own segments in shared memory; `weights` is what they hold. Owners do what is written
in the contract and no more: they begin the turn, stage what workers do not read themselves, and
admit a bucket when all members of its group say that they are ready.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tests.unit.transfer.blocks import Block, open_block
from tests.unit.transfer.reading import Held, shard_key, shards_of
from tests.unit.transfer.staging import Owner, open_staging
from tests.unit.transfer.streaming_cuda import StreamingCuda
from weightbus.consumers.errors import PeerLost, ProofNeeded
from weightbus.consumers.planning.buckets import BucketPlan, plan_buckets
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.transfer.device_lanes import DeviceFeed, DeviceLanes, DeviceStaging
from weightbus.consumers.transfer.lanes import StagingCache, leave_lanes
from weightbus.consumers.transfer.segments import SegmentCache
from weightbus.schemas.layout import Layout
from weightbus.schemas.layout_codec import tensor_bytes
from weightbus.schemas.placement import Segment
from weightbus.schemas.shared_memory import (
    SHM_ADMITTED_OFFSET,
    SHM_FETCHED_OFFSET,
    SHM_FILLED_OFFSET,
    SHM_GIVEN_UP_OFFSET,
    SHM_STAGED_OFFSET,
    TURN_BITS,
)
from weightbus.schemas.worker import LaneFill, StageTiming, Stream

__all__ = (
    "HOST_ID",
    "Fleet",
    "Host",
    "Member",
    "Shape",
    "Worker",
    "clean",
    "open_fleet",
    "open_hosts",
    "wait_until",
)

DEADLINE_S = 30.0
HOST_ID = "host"
_turns = itertools.count(1)
COUNT_MASK = (1 << TURN_BITS) - 1


@dataclass(frozen=True)
class Shape:
    """Of a fleet and its transfers."""

    hosts: int = 1
    workers: int = 2
    """Of every host; each reads all lanes."""
    lanes: int = 2
    """Lane `l` is filled by worker `l % workers`."""
    slots: int = 2
    bucket_bytes: int = 2048
    staged: frozenset[int] = frozenset()
    """Segments that the consumers bring into the blocks."""
    slowly_s: float = 0.0


class Group:
    """One broadcast group of all hosts, over the threads of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.lost = False
        self._change = threading.Condition()
        self._arrived: dict[int, dict[int, int]] = {}
        """Operation -> place -> address."""
        self._ended: dict[int, int] = {}

    def meet(self, number: int, place: int, address: int, size_bytes: int, root: int) -> None:
        """Return when all members hold the root's bytes; what NCCL's kernel does."""
        with self._change:
            places = self._arrived.setdefault(number, {})
            places[place] = address
            if place != root:
                ctypes.memset(address, 0xB6, size_bytes)
            self._change.notify_all()
            while len(places) < self.size and not self.lost:
                assert self._change.wait(DEADLINE_S), "a member did not come"
            if self.lost:
                raise PeerLost("group", ["other"], "aborted")
            if place != root:
                ctypes.memmove(address, places[root], size_bytes)
            self._ended[number] = self._ended.get(number, 0) + 1
            self._change.notify_all()
            while self._ended[number] < self.size and not self.lost:
                assert self._change.wait(DEADLINE_S), "a member did not end"

    def lose(self) -> None:
        with self._change:
            self.lost = True
            self._change.notify_all()


class Member:
    """A communicator of one worker."""

    def __init__(self, cuda: StreamingCuda, group: Group, place: int) -> None:
        self._cuda, self.group, self._place = cuda, group, place
        self._number = itertools.count()
        self.sent: list[tuple[int, int]] = []
        """(Address, root) of every broadcast."""

    def broadcast(
        self,
        address: int,
        size_bytes: int,
        root: int,
        stream: int,
        *,
        check: Callable[[], None],
    ) -> None:
        number, place = next(self._number), self._place

        def work() -> None:
            with suppress(PeerLost):
                self.group.meet(number, place, address, size_bytes, root)

        check()
        self.sent.append((address, root))
        self._cuda.add(stream, work)

    def check(self) -> None:
        if self.group.lost:
            raise PeerLost("group", ["other"], "a member is lost")


class Members:
    """The communicators of one worker, as `Communicators`."""

    def __init__(self, cuda: StreamingCuda, groups: dict[str, Group]) -> None:
        self._cuda, self._groups = cuda, groups
        self.members: dict[str, Member] = {}
        self.dropped: list[str] = []

    def open_all(
        self, fills: Sequence[LaneFill], deadline_s: float, check: Callable[[], None]
    ) -> tuple[Member, ...]:
        assert [fill.number for fill in fills] == sorted(fill.number for fill in fills)
        check()
        for fill in fills:
            member = self.members.get(fill.group)
            if member is None or member.group.lost:
                group = self._groups.setdefault(fill.group, Group(fill.size))
                self.members[fill.group] = Member(self._cuda, group, fill.place)
        return tuple(self.members[fill.group] for fill in fills)

    def drop(self, group: str) -> None:
        self.dropped.append(group)
        member = self.members.pop(group, None)
        if member is None:
            return
        if self._groups.get(group) is member.group:
            del self._groups[group]
        member.group.lose()

    def wait_burials(self, deadline_s: float) -> int:
        return 0

    def close(self, deadline_s: float) -> int:
        for group in list(self.members):
            self.drop(group)
        return 0


class Worker:
    """One reader, and filler of some lanes."""

    def __init__(self, cuda: StreamingCuda, number: int, groups: dict[str, Group]) -> None:
        self.cuda, self.number = cuda, number
        self.groups = Members(cuda, groups)
        self.open()
        self.held: Held = {}
        self.timings: tuple[StageTiming, ...] = ()
        self.failure: Exception | None = None
        self.before: Callable[[int], None] = lambda bucket: None
        """Called when a bucket can be read, before it is."""
        self.before_run: Callable[[Stream], None] = lambda feed: None
        """Called before anything of a transfer is done."""

    def open(self) -> None:
        self.staging = StagingCache("cuda:0", lambda: self.cuda)
        self.segments = SegmentCache(HOST_ID, (), "cuda:0", lambda: self.cuda)
        self.device = DeviceStaging("cuda:0", lambda: self.cuda, self.groups)

    def fed(self, feed: Stream, layout: Layout, blocks: Any) -> DeviceFeed:
        plan = plan_buckets(layout, feed.bucket_bytes, len(feed.lanes))
        sizes = tuple(segment.size_bytes for segment in layout.segments)
        return DeviceFeed(feed, blocks, plan, sizes, self.staging, self.segments)

    def prepare(self, feed: Stream, layout: Layout) -> None:
        budget = Deadline("prepare", DEADLINE_S)
        with self.staging.open_all(feed.lanes, 0, feed.turn, budget, is_read=False) as blocks:
            self.device.prepare(self.fed(feed, layout, blocks), budget)

    def run(self, feed: Stream, layout: Layout, deadline_s: float = DEADLINE_S) -> None:
        """As `ReloadWorker` does; keeps what it reads, or how it failed."""
        budget = Deadline("reload", deadline_s)
        self.held, self.failure = {}, None
        try:
            self.before_run(feed)
            opened = self.staging.open_all(feed.lanes, 0, feed.turn, budget, is_read=False)
            with opened as blocks:
                try:
                    fed = self.fed(feed, layout, blocks)
                    with self.device.open_lanes(fed, budget) as lanes:
                        try:
                            self.read(fed.plan, layout, lanes)
                        except ProofNeeded:
                            lanes.serve()
                            raise
                        self.timings = lanes.timings
                except BaseException:
                    leave_lanes(blocks, feed)
                    raise
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.failure = error

    def read(self, plan: BucketPlan, layout: Layout, lanes: DeviceLanes) -> None:
        shards: dict[int, list[Any]] = {}
        for shard in plan.layout.shards:
            shards.setdefault(shard.segment // plan.lanes, []).append(shard)
        for bucket in range(plan.buckets):
            lanes.wait_filled(bucket)
            self.before(bucket)
            for shard in shards.get(bucket, ()):
                spec = layout.tensors[shard.tensor]
                size_bytes = tensor_bytes(type(spec)(spec.name, spec.dtype, shard.sizes))
                address = lanes.address(bucket, shard.segment % plan.lanes) + shard.offset_bytes
                self.held[shard_key(shard)] = ctypes.string_at(address, size_bytes)
            lanes.done(bucket)

    def wrong(self, plan: BucketPlan, parts: Sequence[bytearray]) -> list[object]:
        """What it has not read as it is."""
        expected = shards_of(plan.layout, parts)
        assert self.held.keys() == expected.keys()
        return [key for key, data in expected.items() if self.held[key] != data]

    def close(self) -> None:
        self.device.close()
        self.staging.close()
        self.segments.close()


@dataclass(eq=False)
class Host:
    """One machine."""

    number: int
    owner: Owner
    segments: list[Block]
    workers: list[Worker]
    sources: list[Segment | None] = field(default_factory=list)


class Fleet:
    """Some hosts, and transfers between them."""

    def __init__(self, layout: Layout, shape: Shape, hosts: Sequence[Host]) -> None:
        self.layout, self.shape, self.hosts = layout, shape, hosts
        self.plan = plan_buckets(layout, shape.bucket_bytes, shape.lanes)
        self.weights: list[bytes] = []
        self.rendezvous = ""
        self.withheld: Callable[[int], bool] = lambda bucket: False
        """Whether owners do not go on to a bucket."""

    @property
    def workers(self) -> list[Worker]:
        return [worker for host in self.hosts for worker in host.workers]

    def write(self, weights: Sequence[bytes]) -> None:
        """A new version, on all hosts."""
        self.weights = list(weights)
        for host in self.hosts:
            host.sources = [
                block.write(data) for block, data in zip(host.segments, weights, strict=True)
            ]

    def feeds(self, host: Host, turn: int) -> list[Stream]:
        shape = self.shape
        sources = tuple(
            None if number in shape.staged else source for number, source in enumerate(host.sources)
        )
        base = Stream(
            lanes=host.owner.names,
            bucket_bytes=shape.bucket_bytes,
            slots=shape.slots,
            turn=turn,
            reader=0,
            device=True,
            sources=sources,
            readers=shape.workers,
        )
        return [
            msgspec.structs.replace(
                base,
                reader=number,
                fills=tuple(
                    LaneFill(
                        lane=lane,
                        number=lane,
                        place=host.number,
                        size=shape.hosts,
                        group=f"g{lane}",
                        rendezvous=self.rendezvous,
                        key=f"turn {turn}",
                    )
                    for lane in range(shape.lanes)
                    if lane % shape.workers == number
                ),
            )
            for number in range(shape.workers)
        ]

    def begin(self) -> int:
        """A new turn, in all blocks."""
        turn = next(_turns)
        for host in self.hosts:
            for block in host.owner.blocks:
                block.set_word(SHM_GIVEN_UP_OFFSET, 0)
                block.set_word(SHM_FETCHED_OFFSET, 0)
                for word in (SHM_FILLED_OFFSET, SHM_STAGED_OFFSET, SHM_ADMITTED_OFFSET):
                    block.set_word(word, turn << TURN_BITS)
        return turn

    def prepare(self, turn: int) -> None:
        self._beside(
            [
                (worker.prepare, feed)
                for host in self.hosts
                for worker, feed in zip(host.workers, self.feeds(host, turn), strict=True)
            ]
        )

    def transfer(self, turn: int | None = None, deadline_s: float = DEADLINE_S) -> None:
        """Bring the version that was written last to all workers."""
        turn = self.begin() if turn is None else turn
        for worker in self.workers:
            worker.failure = None
        gone = threading.Event()
        owner = threading.Thread(target=self._own, args=(turn, gone))
        owner.start()
        try:
            self._beside(
                [
                    (lambda feed, layout, run=worker.run: run(feed, layout, deadline_s), feed)
                    for host in self.hosts
                    for worker, feed in zip(host.workers, self.feeds(host, turn), strict=True)
                ]
            )
        finally:
            gone.set()
            owner.join(DEADLINE_S)

    def check(self, workers: Sequence[Worker] = ()) -> None:
        """Every worker, or some, have read every byte."""
        parts = _staged(self.plan, self.weights)
        for worker in workers or self.workers:
            assert worker.failure is None, repr(worker.failure)
            wrong = worker.wrong(self.plan, parts)
            assert not wrong, f"worker {worker.number} has read other bytes: {wrong[:5]}"

    def give_up(self, turn: int) -> None:
        for host in self.hosts:
            host.owner.give_up(turn)

    def _beside(self, calls: Sequence[tuple[Callable[..., None], Stream]]) -> None:
        failures: list[Exception] = []

        def run(call: Callable[..., None], feed: Stream) -> None:
            try:
                call(feed, self.layout)
            except Exception as error:  # noqa: BLE001 - raised below
                failures.append(error)

        threads = [threading.Thread(target=run, args=each) for each in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * DEADLINE_S)
            assert not thread.is_alive(), "a worker stands still"
        if failures:
            raise failures[0]

    def _own(self, turn: int, gone: threading.Event) -> None:
        """What the owners of all lanes do; a worker that fails makes them give up."""
        staged = {(host.number, lane): 0 for host in self.hosts for lane in range(self.shape.lanes)}
        admitted = dict.fromkeys(range(self.shape.lanes), 0)
        while not gone.wait(2e-4):
            failures = [worker.failure for worker in self.workers if worker.failure]
            if any(not isinstance(failure, ProofNeeded) for failure in failures):
                self.give_up(turn)
                return
            for host in self.hosts:
                for lane, block in enumerate(host.owner.blocks):
                    self._stage(host, lane, block, turn, staged)
            for lane, count in admitted.items():
                blocks = [host.owner.blocks[lane] for host in self.hosts]
                fetched = min(_count(block, SHM_FETCHED_OFFSET, turn) for block in blocks)
                if count < fetched and not self.withheld(count):
                    admitted[lane] = count + 1
                    for block in blocks:
                        block.set_word(SHM_ADMITTED_OFFSET, turn << TURN_BITS | count + 1)

    def _stage(
        self,
        host: Host,
        lane: int,
        block: Block,
        turn: int,
        staged: dict[tuple[int, int], int],
    ) -> None:
        bucket = staged[host.number, lane]
        fetched = _count(block, SHM_FETCHED_OFFSET, turn)
        if bucket >= self.plan.buckets or self.withheld(bucket):
            return
        if bucket - self.shape.slots >= fetched:
            return
        slot = bucket % self.shape.slots * self.shape.bucket_bytes
        if self.shape.staged and (bucket + lane) % self.shape.hosts == host.number:
            block.put(slot, b"\xc7" * self.shape.bucket_bytes)
            for run in self.plan.runs_of(bucket * self.plan.lanes + lane):
                if int(run["segment"]) in self.shape.staged:
                    source, size_bytes = int(run["source"]), int(run["size_bytes"])
                    data = self.weights[int(run["segment"])][source : source + size_bytes]
                    block.put(slot + int(run["staged"]), data)
        staged[host.number, lane] = bucket + 1
        block.set_word(SHM_STAGED_OFFSET, turn << TURN_BITS | bucket + 1)


def _count(block: Block, word: int, turn: int) -> int:
    value = block.word(word)
    return value & COUNT_MASK if value >> TURN_BITS == turn else -1


def _staged(plan: BucketPlan, weights: Sequence[bytes]) -> list[bytearray]:
    """What every part should hold."""
    parts = [bytearray(segment.size_bytes) for segment in plan.layout.segments]
    for run in plan.runs:
        source, staged, size = int(run["source"]), int(run["staged"]), int(run["size_bytes"])
        data = weights[int(run["segment"])][source : source + size]
        parts[int(run["part"])][staged : staged + size] = data
    return parts


@contextmanager
def open_fleet(layout: Layout, shape: Shape) -> Iterator[Fleet]:
    """Hosts that hold no version yet. At the end nobody has left anything on a device."""
    groups: dict[str, Group] = {}
    machines = [StreamingCuda(slowly_s=shape.slowly_s) for _ in range(shape.hosts)]

    def make(host: int, number: int) -> Worker:
        cuda = StreamingCuda(slowly_s=shape.slowly_s, other=machines[host])
        return Worker(cuda, number, groups)

    with open_hosts(layout, shape, make) as fleet:
        yield fleet
    for machine in machines:
        clean(machine)


@contextmanager
def open_hosts(layout: Layout, shape: Shape, make: Callable[[int, int], Worker]) -> Iterator[Fleet]:
    """Hosts of workers that are made by the numbers of host and worker, and closed at the end."""
    with ExitStack() as stack:
        hosts: list[Host] = []
        for number in range(shape.hosts):
            host_bytes = shape.slots * shape.bucket_bytes if shape.staged else 0
            owner = stack.enter_context(open_staging(shape.lanes, host_bytes))
            segments = [
                stack.enter_context(open_block(bytes(segment.size_bytes), HOST_ID))
                for segment in layout.segments
            ]
            workers = []
            for place in range(shape.workers):
                workers.append(make(number, place))
                stack.callback(workers[-1].close)
            hosts.append(Host(number, owner, segments, workers))
        yield Fleet(layout, shape, hosts)


def clean(cuda: StreamingCuda) -> None:
    """Nobody has left anything. Workers end in any order: that the handles of slots are open still
    when these are freed is all right as long as nobody reads there."""
    cuda.undefined[:] = [text for text in cuda.undefined if "was freed while open" not in text]
    cuda.assert_clean()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(1e-3)
