"""Fills the lanes of one host, bucket after bucket: fetch, broadcast and reload side by side.

Owns nothing: blocks, group and fetcher belong to the route. In every lane the part of bucket k goes
into slot k % slots once all readers have done with bucket k - slots. Its root fetches it and
broadcasts it to the lane's other members; then the readers are told. Fetching runs ahead of the
broadcast as far as slots are free: with one slot everything takes turns.

Invariants: broadcasts of a group follow the order of the buckets on every member, and none begins
before every member has room for it (and its root has the bytes), so that who waits in one waits for
the network alone. However the pipeline ends but well, all its blocks are given up.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple

import anyio

from weightbus.consumers.errors import DeadlineExceeded, PeerLost, WorkerLost
from weightbus.consumers.planning.buckets import BucketPlan
from weightbus.consumers.transfer.fetch import Fetcher, Read
from weightbus.consumers.transfer.staging import StagingBlock
from weightbus.consumers.transfer.together import run_together
from weightbus.schemas.base import Stage
from weightbus.schemas.worker import StageTiming

__all__ = ("Exchange", "Lane", "Pipeline", "Reader")

FIRST_POLL_S: Final = 1e-4
LONGEST_POLL_S: Final = 1e-3

ROLL_CALL_S: Final = 1.0
"""A member that is not ready says so this often, so that the others know that it lives."""

ROLL_CALLS_PER_STALL: Final = 4
"""And at least so many times before they would think otherwise."""

FOREIGN_PATIENCE: Final = 3
"""Who depends on lanes of other consumers may stand still through no fault of his own: their owners
have so many times the usual time to find out first."""


class Exchange(ABC):
    """One lane's group, as one of its members has it: how bytes come to other hosts."""

    id: str
    """Of the group."""
    place: int
    """This member's rank in the group."""
    size: int
    others: tuple[str, ...]
    """The other members, for messages."""

    @abstractmethod
    async def agree(self, ready: bool, deadline_s: float) -> bool:
        """Whether every member is ready. All members call it, as often, in the same order.

        Raises:
            PeerLost: a member is gone, or did not call it in time.
        """

    @abstractmethod
    async def broadcast(self, address: int, size_bytes: int, root: int, deadline_s: float) -> None:
        """Bring memory of this process to that of the root; the root's stays as it is.

        All members call it for the same bytes in the same order. If it is cancelled or fails, the
        memory may still be written to.

        Raises:
            PeerLost: it failed, or did not end in time.
        """

    @abstractmethod
    def writing(self) -> bool:
        """Whether an operation that was left may still write to the memory it was given."""


class Reader(NamedTuple):
    """One worker of this host; its place in the list of readers is its number."""

    name: str
    """`engine/rank`, for messages."""
    rank: int
    """Of its engine."""
    own: bool
    """Of the engine of this consumer; the others' consumers look after theirs."""


@dataclass(eq=False)
class Timing:
    """When a stage of a lane first began and last ended."""

    start_ns: int = 0
    end_ns: int = 0
    bytes: int = 0

    def add(self, start_ns: int, size_bytes: int) -> None:
        self.start_ns = self.start_ns or start_ns
        self.end_ns = time.time_ns()
        self.bytes += size_bytes


@dataclass(eq=False, kw_only=True)
class Lane:
    """One lane that this consumer owns."""

    number: int
    """Among all lanes of the plan."""
    block: StagingBlock
    rank: int
    """Of this consumer's engine, whose stages the lane's fetch and broadcast are shown as."""
    exchange: Exchange | None = None
    """None: there is no other host."""
    fetch: Timing = field(default_factory=Timing)
    broadcast: Timing = field(default_factory=Timing)
    fetched: int = 0
    """The first so many buckets are fetched, as far as this member is their root."""
    filled: int = 0
    """The first so many buckets are filled."""

    def root(self, bucket: int) -> int:
        """Which member of the group fetches a bucket."""
        return (bucket + self.number) % (self.exchange.size if self.exchange else 1)

    def is_root(self, bucket: int) -> bool:
        return self.root(bucket) == (self.exchange.place if self.exchange else 0)


class Pipeline:
    """One transfer through lanes of this consumer. To be run once.

    Args:
        lanes: those that this consumer owns; their blocks have as many slots each.
        readers: all workers of this host, in the order of their numbers.
        turn: of this transfer, in the blocks' words.
        stall_s: how long a fetch, a broadcast or a reader may stand still.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        plan: BucketPlan,
        fetcher: Fetcher,
        readers: Sequence[Reader],
        *,
        turn: int,
        stall_s: float,
    ) -> None:
        assert lanes
        self.lanes = tuple(lanes)
        self.readers = tuple(readers)
        self.primed = anyio.Event()
        """Set once every slot that can be filled without readers is filled, or nothing will be."""
        self._plan, self._fetcher = plan, fetcher
        self._turn, self._stall_s = turn, stall_s
        self._slots = lanes[0].block.slots
        self._stands: dict[int, tuple[tuple[int, bool], float]] = {}
        """Reader -> what was last seen of it, and since when it is so."""
        self._end = 0.0

    @property
    def is_shared(self) -> bool:
        """Whether others than this consumer's own engine depend on these lanes."""
        return not all(reader.own for reader in self.readers) or any(
            lane.exchange is not None and lane.exchange.size > 1 for lane in self.lanes
        )

    @property
    def has_all_lanes(self) -> bool:
        """Whether no lane of this host is another consumer's."""
        return len(self.lanes) == self._plan.lanes

    def timings(self, rank: int) -> tuple[StageTiming, ...]:
        """What the lanes of a rank took."""
        stages: tuple[tuple[Stage, Callable[[Lane], Timing]], ...] = (
            ("fetch", lambda lane: lane.fetch),
            ("broadcast", lambda lane: lane.broadcast),
        )
        return tuple(
            StageTiming(stage, timing.start_ns, timing.end_ns, timing.bytes)
            for stage, of in stages
            for timing in (of(lane) for lane in self.lanes if lane.rank == rank)
            if timing.bytes
        )

    async def run(self, deadline_s: float) -> None:
        """Fill all buckets of all lanes; returns when the readers have done with the last.

        Raises:
            PeerLost: a member of a group is gone or stands still.
            WorkerLost: a worker of this consumer's engine stands still.
            SegmentUnavailable, TornRead: the bytes cannot be fetched.
            DeadlineExceeded
        """
        self._end = anyio.current_time() + deadline_s
        well = False
        for lane in self.lanes:
            lane.block.begin(self._turn)
        try:
            with anyio.fail_after(deadline_s):
                await run_together(partial(self._run_lane, lane) for lane in self.lanes)
            well = True
        except TimeoutError as error:
            raise DeadlineExceeded("stream", deadline_s) from error
        finally:
            if not well:
                for lane in self.lanes:
                    lane.block.give_up()
            self.primed.set()

    async def _run_lane(self, lane: Lane) -> None:
        self._look_if_primed()
        await run_together((partial(self._fetch, lane), partial(self._exchange, lane)))
        await self._drain(lane)

    async def _fetch(self, lane: Lane) -> None:
        """The parts that this member is the root of, as early as there is room."""
        for bucket in range(self._plan.buckets):
            if not lane.is_root(bucket):
                continue
            await self._until(partial(self._has_room, lane, bucket))
            if reads := self._reads(lane, bucket):
                start_ns = time.time_ns()
                await self._fetcher.fetch(reads, self._patience_s())
                lane.fetch.add(start_ns, sum(read.size_bytes for read in reads))
            lane.fetched = bucket + 1

    async def _exchange(self, lane: Lane) -> None:
        """Every part, in order: broadcast it, then tell the readers."""
        for bucket in range(self._plan.buckets):
            ready = partial(self._is_ready, lane, bucket)
            size_bytes = self._plan.part_bytes(bucket * self._plan.lanes + lane.number)
            if lane.exchange is None or lane.exchange.size == 1:
                await self._until(ready)
            else:
                await self._until_all_are(ready, lane.exchange)
                if size_bytes:
                    start_ns = time.time_ns()
                    address = lane.block.slot_address(bucket % self._slots)
                    await lane.exchange.broadcast(
                        address, size_bytes, lane.root(bucket), self._patience_s()
                    )
                    lane.broadcast.add(start_ns, size_bytes)
            lane.filled = bucket + 1
            lane.block.filled(lane.filled)
            self._look_if_primed()

    async def _drain(self, lane: Lane) -> None:
        """Wait until nobody reads the block any more. Who reads it for another consumer and stands
        still is given up: what this consumer's engine needs, it has."""
        try:
            await self._until(partial(self._has_room, lane, self._plan.buckets + self._slots - 1))
        except PeerLost:
            lane.block.give_up()

    def _is_ready(self, lane: Lane, bucket: int) -> bool:
        return self._has_room(lane, bucket) and (not lane.is_root(bucket) or lane.fetched > bucket)

    def _has_room(self, lane: Lane, bucket: int) -> bool:
        """Whether the bucket's slot is free.

        Raises:
            WorkerLost, PeerLost: a reader that still has it stands still.
        """
        wanted = bucket - self._slots + 1
        if wanted <= 0:
            return True
        if lane.filled < wanted:  # readers may have left; other hosts still want what is in it
            return False
        free = True
        for number, reader in enumerate(self.readers):
            done = lane.block.done(number)
            if done < wanted:
                free = False
                self._check_stall(lane, number, reader, done)
        return free

    def _check_stall(self, lane: Lane, number: int, reader: Reader, done: int) -> None:
        """A reader that has begun, and finds its next bucket in every lane, must go on."""
        can_go_on = done >= 0 and all(other.filled > done for other in self.lanes)
        now = anyio.current_time()
        seen = (done, can_go_on)
        known = self._stands.get(number)
        if known is None or known[0] != seen:
            self._stands[number] = (seen, now)
            return
        patience_s = self._stall_s * (1 if self.has_all_lanes else FOREIGN_PATIENCE)
        if can_go_on and now - known[1] > patience_s:
            reason = f"it stands still at bucket {done} for {now - known[1]:.1f} s"
            if reader.own:
                raise WorkerLost(reader.rank, reason)
            raise PeerLost(lane.block.name, [reader.name], reason)

    async def _until_all_are(self, ready: Callable[[], bool], exchange: Exchange) -> None:
        """Wait for all members of a group to be ready. Who is not says so now and then: it may wait
        for its engine much longer than a group waits for an operation."""
        agreed = False
        while not agreed:
            with anyio.move_on_after(min(ROLL_CALL_S, self._stall_s / ROLL_CALLS_PER_STALL)):
                await self._until(ready)
            agreed = await exchange.agree(ready(), self._patience_s())

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for what readers or other tasks of this process bring about."""
        pause_s = FIRST_POLL_S
        while not condition():
            await anyio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_POLL_S)

    def _reads(self, lane: Lane, bucket: int) -> list[Read]:
        base = lane.block.slot_address(bucket % self._slots)
        runs = self._plan.runs_of(bucket * self._plan.lanes + lane.number)
        return [
            Read(segment, source, base + staged, size_bytes)
            for segment, source, staged, size_bytes in runs[
                ["segment", "source", "staged", "size_bytes"]
            ].tolist()
        ]

    def _patience_s(self) -> float:
        """How long one step may take. The whole run has its own deadline."""
        return min(self._stall_s, max(0.0, self._end - anyio.current_time()))

    def _look_if_primed(self) -> None:
        ahead = min(self._slots, self._plan.buckets)
        if all(lane.filled >= ahead for lane in self.lanes):
            self.primed.set()
