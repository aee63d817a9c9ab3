"""Fills the lanes of one host, bucket after bucket: fetch, broadcast and reload side by side.

Owns nothing: blocks, group and fetcher belong to the route. In every lane the part of bucket k goes
into slot k % slots once all readers have done with bucket k - slots. Its root fetches it and
broadcasts it to the lane's other members; then the readers are told. Fetching runs ahead of the
broadcast as far as slots are free: with one slot everything takes turns. Lanes in memory of GPUs
are filled by workers: see `weightbus.consumers.transfer.device_pipeline`.

Invariants: broadcasts of a group follow the order of the buckets on every member, and none begins
before every member has room for it (and its root has the bytes), so that who waits in one waits for
the network alone. No member waits for another without a bound, and who cannot go on says so before
he leaves. However the pipeline ends but well, all its blocks are given up.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Final

import anyio

from weightbus.consumers.errors import DeadlineExceeded, PeerLost, WorkerLost
from weightbus.consumers.planning.buckets import BucketPlan
from weightbus.consumers.transfer.exchange import LEAVING, READY, WAITING, Exchange
from weightbus.consumers.transfer.fetch import Fetcher, Read
from weightbus.consumers.transfer.staging import StagingBlock
from weightbus.consumers.transfer.timing import Timing
from weightbus.consumers.transfer.together import run_together
from weightbus.consumers.transfer.watch import Reader, Watch
from weightbus.schemas.base import Stage
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.worker import StageTiming

__all__ = ("Lane", "Pipeline", "Reader")

FIRST_POLL_S: Final = 1e-4
LONGEST_POLL_S: Final = 1e-3

ROLL_CALL_S: Final = 1.0
"""A member that is not ready says so this often, so that the others know that it lives."""

ROLL_CALLS_PER_STALL: Final = 4
"""And at least so many times before they would think otherwise."""

START_STALLS: Final = 2
"""Members come to the first roll call at their own time: memory of a group that broke may have to
be waited for. This and the following count in `stall_s`."""

WAITING_STALLS: Final = 4
"""So long a member may be waited for, whose engine is slow to pause or whose fetch makes no
progress; but not longer than half of what there is, so that the others have the other half."""

NEIGHBOUR_STALLS: Final = 2
"""So much longer a reader may stand still that may wait for a lane of another consumer."""

MEMBER_STALLS: Final = 3
"""So much longer the others wait for a member that should have left by itself."""

FINGERPRINT_BYTES: Final = 8


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
    fetched_s: float = 0.0
    """When a fetch last made progress."""
    failure: WeightBusError | None = None
    """Why this member cannot go on, whatever it hears of others."""
    filled: int = 0
    """The first so many buckets are filled."""

    @property
    def group(self) -> Exchange | None:
        """Of several members; None: there is nothing to exchange."""
        return self.exchange if self.exchange and self.exchange.size > 1 else None

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
        stall_s: how long a step of a fetch, of a broadcast or of a reader may stand still.
        fingerprint: of what all members must agree on: which bytes go where.
        leave: called once if it fails before its lanes' ends: nobody shall wait for this member.
    """

    begins_paused: ClassVar[bool] = False
    """Whether nothing is fetched before the engine is paused."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        plan: BucketPlan,
        fetcher: Fetcher,
        readers: Sequence[Reader],
        *,
        turn: int,
        stall_s: float,
        fingerprint: bytes = bytes(FINGERPRINT_BYTES),
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        assert lanes
        assert len(fingerprint) == FINGERPRINT_BYTES
        self.lanes = tuple(lanes)
        self.readers = tuple(readers)
        self.begun = anyio.Event()
        """Set once the blocks' words are those of this turn, or it has ended."""
        self.primed = anyio.Event()
        """Set once all is done that can be done without readers, or nothing will be."""
        self.suspect: WorkerLost | None = None
        """What is the matter if our worker does not answer, who may be whom the others wait for."""
        self._plan, self._fetcher = plan, fetcher
        self._turn, self._stall_s = turn, stall_s
        self._fingerprint, self._leave = fingerprint, leave
        self._tasks: tuple[Callable[[Lane], Awaitable[None]], ...] = (self._fetch, self._exchange)
        """Of every lane, side by side."""
        self._slots = lanes[0].block.slots
        self._end = self._waiting_s = 0.0
        self._watch = Watch(readers, stall_s, None, 0)
        self._gone: set[tuple[int, int]] = set()
        """(Lane, reader of another consumer) that is not waited for any more."""
        self._awaited: dict[int, list[str]] = {}
        """Lane -> members that it waits for, while this one is ready."""

    @property
    def is_shared(self) -> bool:
        """Whether others than this consumer's own engine depend on these lanes."""
        return not all(reader.own for reader in self.readers) or any(
            lane.group is not None for lane in self.lanes
        )

    @property
    def has_all_lanes(self) -> bool:
        """Whether no lane of this host is another consumer's."""
        return len(self.lanes) == self._plan.lanes

    def misses(self, others: Sequence[str], reason: str) -> bool:
        """Whether a worker that misses a segment misses a lane of another consumer.

        Args:
            others: lanes of this host that this consumer does not own.
            reason: what the worker says.
        """
        del reason  # it reads nothing but lanes, and those here are well
        return bool(others)

    def timings(self, rank: int) -> tuple[StageTiming, ...]:
        """What the lanes of a rank took."""
        stages: tuple[tuple[Stage, Callable[[Lane], Timing]], ...] = (
            ("fetch", lambda lane: lane.fetch),
            ("broadcast", lambda lane: lane.broadcast),
        )
        return tuple(
            timing
            for stage, of in stages
            for lane in self.lanes
            if lane.rank == rank
            for timing in of(lane).told(stage)
        )

    def tell(self) -> None:
        """The workers of this consumer are told to read: from now on they are to begin."""
        self._watch.tell()

    async def run(self, deadline_s: float) -> None:
        """Fill all buckets of all lanes; returns when the readers have done with the last.

        Raises:
            PeerLost: a member of a group is gone, stands still, or is not ready in time.
            WorkerLost: a worker of this consumer's engine stands still, or does not begin.
            SegmentUnavailable, TornRead: the bytes cannot be fetched.
            DeadlineExceeded: also when this consumer's engine takes too long for the others.
        """
        self._end = anyio.current_time() + deadline_s
        self._waiting_s = min(WAITING_STALLS * self._stall_s, deadline_s / 2)
        shared_s = None
        if not self.has_all_lanes:
            shared_s = self._waiting_s + NEIGHBOUR_STALLS * self._stall_s
        tensors = len(self._plan.layout.tensors)
        self._watch = Watch(self.readers, self._stall_s, shared_s, tensors)
        well = False
        for lane in self.lanes:
            lane.block.begin(self._turn)
        self.begun.set()
        try:
            with anyio.fail_after(deadline_s):
                await run_together(partial(self._run_lane, lane) for lane in self.lanes)
            well = True
        except TimeoutError as error:
            raise self._too_late(deadline_s) from error
        except PeerLost as error:
            for lane in self.lanes:
                if lane.failure not in (None, error):  # in another lane others were as early
                    raise lane.failure from error
            raise
        finally:
            if not well:
                for lane in self.lanes:
                    lane.block.give_up()
                if any(lane.filled < self._plan.buckets for lane in self.lanes):
                    self._leave()
            self.primed.set()

    async def _run_lane(self, lane: Lane) -> None:
        self._look_if_primed()
        await run_together(partial(task, lane) for task in self._tasks)
        await self._drain(lane)

    async def _fetch(self, lane: Lane) -> None:
        """The parts that this member is the root of, as early as there is room. If it fails, that
        is left to `_exchange`, which tells the other members."""
        try:
            for bucket in range(self._plan.buckets):
                if not lane.is_root(bucket):
                    continue
                await self._until(partial(self._has_room, lane, bucket))
                await self._bring(lane, self._reads(lane, bucket))
                lane.fetched = bucket + 1
        except WeightBusError as error:
            lane.failure = error

    async def _bring(self, lane: Lane, reads: Sequence[Read]) -> None:
        if not reads:
            return
        start_ns = time.time_ns()
        await self._fetcher.fetch(reads, self._stall_s)
        lane.fetch.add(start_ns, sum(read.size_bytes for read in reads))
        lane.fetched_s = anyio.current_time()

    async def _exchange(self, lane: Lane) -> None:
        """Every part, in order: broadcast it, then tell the readers."""
        exchange = lane.group
        if exchange is not None:
            await self._compare(exchange)
        for bucket in range(self._plan.buckets):
            size_bytes = self._plan.part_bytes(bucket * self._plan.lanes + lane.number)
            if exchange is None:
                await self._until(partial(self._is_ready, lane, bucket))
            else:
                await self._until_all_are_ready(lane, exchange, bucket)
                if size_bytes:
                    start_ns = time.time_ns()
                    address = lane.block.slot_address(bucket % self._slots)
                    await exchange.broadcast(address, size_bytes, lane.root(bucket), self._stall_s)
                    lane.broadcast.add(start_ns, size_bytes)
            lane.filled = bucket + 1
            lane.block.filled(lane.filled)
            self._look_if_primed()

    async def _drain(self, lane: Lane) -> None:
        """Wait until nobody reads the block any more. Who reads it for another consumer and stands
        still is given up once all others are at the end: what this consumer's engine needs, it
        has then."""
        last = self._plan.buckets + self._slots - 1
        await self._until(partial(self._has_room, lane, last, draining=True))
        if any(number == lane.number for number, _ in self._gone):
            lane.block.give_up()

    def _is_ready(self, lane: Lane, bucket: int) -> bool:
        if lane.failure is not None:
            raise lane.failure
        return self._has_room(lane, bucket) and (not lane.is_root(bucket) or lane.fetched > bucket)

    def _has_room(self, lane: Lane, bucket: int, *, draining: bool = False) -> bool:
        """Whether the bucket's slot is free.

        Args:
            draining: do without readers of other consumers that stand still.

        Raises:
            WorkerLost, PeerLost: a reader that still has it stands still.
        """
        wanted = bucket - self._slots + 1
        if wanted <= 0:
            return True
        if lane.filled < wanted:  # readers may have left; other hosts still want what is in it
            return False
        free = True
        filled = min(other.filled for other in self.lanes)
        for number, done in self._behind(lane, wanted):
            name = lane.block.name
            error = self._watch.stall_of(name, lane.number, number, done, filled)
            if error is None:
                free = False
            elif draining and isinstance(error, PeerLost):
                self._gone.add((lane.number, number))
            else:
                raise error
        return free

    def _behind(self, lane: Lane, wanted: int) -> list[tuple[int, int]]:
        """(Reader, its done buckets) of those who have not done with the first `wanted` buckets."""
        return [
            (number, done)
            for number in range(len(self.readers))
            if (done := lane.block.done(number)) < wanted
            and (lane.number, number) not in self._gone
        ]

    async def _compare(self, exchange: Exchange) -> None:
        """See that all members bring the same bytes to the same places, before the first of them.

        Raises:
            PeerLost: one does not.
        """
        answers = await exchange.roll_call(self._fingerprint, self._patience_s(START_STALLS))
        others = [place for place, answer in enumerate(answers) if answer != self._fingerprint]
        if others:
            names = [exchange.name_of(place) for place in others]
            found = f"{answers[others[0]].hex()}, ours is {self._fingerprint.hex()}"
            reason = f"it cuts the version in another way: the fingerprint is {found}"
            raise PeerLost(exchange.id, names, reason)

    async def _until_all_are_ready(self, lane: Lane, exchange: Exchange, bucket: int) -> None:
        """Wait for all members of a group. Who is not ready says so now and then: it may wait for
        its engine longer than a group waits for an operation, but not for ever.

        Raises:
            PeerLost: a member leaves, or should have.
        """
        since: dict[int, float] = {exchange.place: anyio.current_time()}
        while True:
            answer = await self._answer(lane, exchange, bucket, since[exchange.place])
            answers = await exchange.roll_call(answer, self._patience_s())
            if all(other == READY for other in answers):
                self._awaited.pop(lane.number, None)
                return
            self._look_at(exchange, bucket, answers, since)
            late = [n for n, other in enumerate(answers) if other != READY and n != exchange.place]
            self._awaited[lane.number] = [exchange.name_of(n) for n in late if answer == READY]

    async def _answer(self, lane: Lane, exchange: Exchange, bucket: int, since_s: float) -> bytes:
        """What this member says to the next roll call. Who cannot go on tells the others."""
        ready = partial(self._is_ready, lane, bucket)
        try:
            with anyio.move_on_after(self._roll_call_s):
                await self._until(ready)
            if ready():
                return READY
            self._check_waiting(lane, bucket, since_s)
        except WeightBusError as error:
            lane.failure = error
            with suppress(PeerLost):
                await exchange.roll_call(LEAVING, 2 * self._roll_call_s)
            raise
        return WAITING

    def _check_waiting(self, lane: Lane, bucket: int, since_s: float) -> None:
        """The others do not wait for this member for ever.

        Raises:
            DeadlineExceeded: its engine is not paused, or its fetch makes no progress.
            PeerLost: readers of other consumers have not begun.
        """
        for_s = anyio.current_time() - max(since_s, lane.fetched_s)
        if for_s <= self._waiting_s:
            return
        behind = self._behind(lane, bucket - self._slots + 1)
        if not self._watch.told and (behind or self.begins_paused):
            raise DeadlineExceeded("pause", self._waiting_s)
        if not behind:
            raise DeadlineExceeded("fetch", self._waiting_s)
        if for_s > self._waiting_s + NEIGHBOUR_STALLS * self._stall_s:
            number, done = behind[0]
            reason = f"it is at bucket {done}, and the group has waited for {for_s:.1f} s"
            raise self._watch.lost(lane.block.name, number, reason)

    def _look_at(
        self, exchange: Exchange, bucket: int, answers: Sequence[bytes], since: dict[int, float]
    ) -> None:
        """
        Raises:
            PeerLost: a member leaves, or has not been ready for longer than it may.
        """
        now = anyio.current_time()
        for place, answer in enumerate(answers):
            if place == exchange.place or answer == READY:
                continue
            name = exchange.name_of(place)
            if answer != WAITING:
                raise PeerLost(exchange.id, [name], f"it cannot go on, and left at bucket {bucket}")
            for_s = now - since.setdefault(place, now)
            if for_s > self._waiting_s + MEMBER_STALLS * self._stall_s:
                reason = f"it is not ready for bucket {bucket} for {for_s:.1f} s"
                raise PeerLost(exchange.id, [name], reason)

    def _too_late(self, deadline_s: float) -> WeightBusError:
        """Who waits for others at the deadline has not failed himself."""
        awaited = sorted({name for names in self._awaited.values() for name in names})
        if not awaited:
            return DeadlineExceeded("stream", deadline_s)
        return PeerLost("of a lane", awaited, f"it was not ready within {deadline_s:g} s")

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

    @property
    def _roll_call_s(self) -> float:
        return min(ROLL_CALL_S, self._stall_s / ROLL_CALLS_PER_STALL)

    def _patience_s(self, stalls: int = 1) -> float:
        """How long one step may take. The whole run has its own deadline."""
        return min(stalls * self._stall_s, max(0.0, self._end - anyio.current_time()))

    def _look_if_primed(self) -> None:
        ahead = min(self._slots, self._plan.buckets)
        if all(lane.filled >= ahead for lane in self.lanes):
            self.primed.set()
