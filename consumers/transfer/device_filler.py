"""Fills device lanes, as one worker does beside its reading: copies, broadcasts, and what it tells.

Owns the events of what it has queued in the worker's streams; slots, streams and communicators are
the caller's. `step` does whatever can be done now and never waits: it is called again and again by
who waits for the lanes. In every lane bucket k goes into slot k % slots once all readers of the
host have done with bucket k - slots. Its root copies its runs there; a bucket of a group is then
broadcast once the owner of the lane has admitted it.

Invariants:
    Nothing is queued that leaves its segment, its host slot or its slot: all runs are checked
    first.
    What is told of a bucket was seen to be done on the device, and its segments to be those that
    were promised, before it is told.
    Broadcasts follow one order, of bucket and lane, on every member, whatever groups they are of:
    no two members can wait for each other.
    A slot is not written to before all readers have done with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from weightbus.bus.cuda import CudaRuntime
from weightbus.bus.errors import CudaFailed
from weightbus.consumers.errors import PlanError, SegmentUnavailable
from weightbus.consumers.planning.buckets import BucketPlan
from weightbus.consumers.transfer.lanes import Budget, StagingBlock
from weightbus.consumers.transfer.timing import Timing
from weightbus.schemas.shared_memory import (
    SHM_ADMITTED_OFFSET,
    SHM_FETCHED_OFFSET,
    SHM_FILLED_OFFSET,
    SHM_STAGED_OFFSET,
)
from weightbus.schemas.worker import LaneFill, StageTiming, Stream

__all__ = ("Broadcaster", "FilledLane", "Filler", "Source", "root_runs")

COPY_BYTES: Final = 16 * 2**20
"""Copied at a time, up to the next address that is a multiple: what else goes to the device, such
as a kernel's tables, gets in between, and no copy leaves its registration (`REGISTERED_BYTES`)."""


class Source(Protocol):
    """A segment that the worker reads itself."""

    name: str
    size_bytes: int

    @property
    def address(self) -> int:
        """Of its first byte, for the worker's GPU."""

    def check(self) -> None:
        """Raises `TornRead` if it is not what was promised any more."""


class Broadcaster(Protocol):
    """A communicator, as `weightbus.consumers.transfer.communicators.Communicator`."""

    def broadcast(
        self,
        address: int,
        size_bytes: int,
        root: int,
        stream: int,
        *,
        check: Callable[[], None],
    ) -> None:
        """Queue a broadcast of device memory in place."""

    def check(self) -> None:
        """Raises if it has failed."""


@dataclass(frozen=True, kw_only=True)
class FilledLane:
    """A device lane that this worker fills."""

    fill: LaneFill
    block: StagingBlock
    address: int
    """Of its first slot, on this worker's GPU."""
    group: Broadcaster | None = None
    """None: nothing is broadcast."""


@dataclass(eq=False)
class _Progress:
    """How far a lane is; all count buckets."""

    lane: FilledLane
    runs: npt.NDArray[np.void]
    """Those of the parts that this worker is the root of."""
    queued: int = 0
    fetched: int = 0
    sent: int = 0
    filled: int = 0
    copies: deque[int] = field(default_factory=deque)
    """Event of every bucket from `fetched` to `queued`; 0: nothing was copied."""
    broadcasts: deque[int] = field(default_factory=deque)
    """The same from `filled` to `sent`."""


class Filler:
    """The lanes that one worker fills in one transfer. For one thread.

    Args:
        plan: how the layout is cut.
        lanes: in any order; their owners have begun the turn.
        sources: number of a segment -> how it is read; what is missing is staged by the consumer.
        streams: of the device: one for copies, one for broadcasts; nobody else's.

    Raises:
        PlanError: a run would leave its segment or its slot.
        SegmentUnavailable: a block has no room for what its owner has to stage.
    """

    def __init__(
        self,
        plan: BucketPlan,
        feed: Stream,
        lanes: Sequence[FilledLane],
        sources: Mapping[int, Source],
        cuda: CudaRuntime,
        device: int,
        streams: tuple[int, int],
        budget: Budget,
    ) -> None:
        self._budget = budget
        self._plan, self._feed, self._sources = plan, feed, sources
        self._cuda, self._device = cuda, device
        self._copying, self._broadcasting = streams
        ordered = sorted(lanes, key=lambda lane: lane.fill.number)
        self._lanes = [_Progress(lane, root_runs(plan, lane.fill)) for lane in ordered]
        self._order = [
            (bucket, each)
            for bucket in range(plan.buckets)
            for each in self._lanes
            if each.lane.group is not None
        ]
        self._next = 0
        """Index into the order of the broadcast that is to be queued."""
        self._copied = Timing()
        for each in self._lanes:
            self._check(each)

    @property
    def is_done(self) -> bool:
        """Whether all buckets of all lanes are filled."""
        return all(each.filled == self._plan.buckets for each in self._lanes)

    @property
    def timings(self) -> tuple[StageTiming, ...]:
        """When what this worker has read was copied."""
        return self._copied.told("fetch")

    def step(self) -> None:
        """Do what can be done now.

        Raises:
            SegmentUnavailable: the owner of a lane has given up.
            TornRead: a segment was written while it was read.
            DeadlineExceeded
            PeerLost, NcclFailed: a broadcast cannot go on.
            CudaFailed: the device refuses something, or what was queued has failed.
        """
        self._go_on()
        self._copy()
        for each in self._lanes:
            self._see_copies(each)
        self._broadcast()
        for each in self._lanes:
            self._see_broadcasts(each)

    def close(self) -> None:
        """Forget the events. What was queued is not waited for."""
        for each in self._lanes:
            for event in (*each.copies, *each.broadcasts):
                with suppress(CudaFailed):  # it goes with the process, and hides no other error
                    self._forget(event)
            each.copies.clear()
            each.broadcasts.clear()

    def _go_on(self) -> None:
        """
        Raises:
            SegmentUnavailable: the owner of a lane has given up.
            DeadlineExceeded
        """
        self._budget.check()
        for each in self._lanes:
            each.lane.block.filled(self._feed.turn)

    def _check(self, each: _Progress) -> None:
        runs, fill = each.runs, each.lane.fill
        outside = (runs["staged"] < 0) | (
            runs["staged"] + runs["size_bytes"] > self._plan.bucket_bytes
        )
        if outside.any():
            limit = f"must stay within {self._plan.bucket_bytes:,} bytes"
            raise PlanError(f"a run of lane {fill.lane}", runs[outside][0], limit)
        is_read = np.zeros(runs.size, dtype=np.bool_)
        for number in np.unique(runs["segment"]).tolist():
            source = self._sources.get(number)
            if source is None:
                continue
            chosen = runs["segment"] == number
            ends = runs["source"][chosen] + runs["size_bytes"][chosen]
            if runs["source"][chosen].min() < 0 or ends.max() > source.size_bytes:
                limit = f"its buckets take bytes up to {int(ends.max())} of it"
                raise PlanError(f"segment {number}", f"{source.size_bytes} bytes long", limit)
            is_read |= chosen
        need_bytes = self._feed.slots * self._plan.bucket_bytes
        if not is_read.all() and each.lane.block.size_bytes < need_bytes:
            found = f"{each.lane.block.size_bytes:,} bytes long"
            raise SegmentUnavailable(each.lane.block.name, found, f"must hold {need_bytes:,}")

    # -- copies

    def _copy(self) -> None:
        """Queue the copies of all buckets that there is room for, the first ones of all lanes
        first."""
        ready = {
            id(each): min(self._plan.buckets, self._room(each))
            for each in self._lanes
            if each.queued < self._plan.buckets
        }
        while True:
            waiting = [each for each in self._lanes if each.queued < ready.get(id(each), 0)]
            if not waiting:
                return
            each = min(waiting, key=lambda one: one.queued)
            if not self._queue(each):
                ready[id(each)] = 0

    def _room(self, each: _Progress) -> int:
        """For so many buckets, from the first, there is or was a free slot. Readers may have left;
        other hosts still want what is not filled."""
        least = each.lane.block.least_done(self._feed.readers, self._feed.turn)
        return self._feed.slots + max(0, min(least, each.filled))

    def _queue(self, each: _Progress) -> bool:
        """Queue the copies of a lane's next bucket; False: its owner has not staged it."""
        bucket, event = each.queued, 0
        runs = self._runs(each, bucket)
        if runs.size:
            staged = each.lane.block.count(SHM_STAGED_OFFSET, self._feed.turn)
            slot = bucket % self._feed.slots * self._plan.bucket_bytes
            copies = []
            for segment, source, offset, size_bytes in runs[
                ["segment", "source", "staged", "size_bytes"]
            ].tolist():
                known = self._sources.get(segment)
                if known is None:
                    if staged <= bucket:
                        return False
                    address = each.lane.block.address + slot + offset
                else:
                    address = known.address + source
                copies.append((each.lane.address + slot + offset, address, size_bytes))
            self._copied.begin()
            for destination, address, size_bytes in copies:
                self._queue_copy(destination, address, size_bytes)
            event = self._cuda.record_event(self._device, self._copying)
        each.copies.append(event)
        each.queued = bucket + 1
        return True

    def _queue_copy(self, destination: int, source: int, size_bytes: int) -> None:
        done = 0
        while done < size_bytes:
            count = min(COPY_BYTES - (source + done) % COPY_BYTES, size_bytes - done)
            self._cuda.copy_async(
                self._device, destination + done, source + done, count, self._copying
            )
            done += count

    def _see_copies(self, each: _Progress) -> None:
        before = each.fetched
        while each.copies and self._is_over(each.copies[0]):
            event = each.copies.popleft()
            if event:
                self._forget(event)
                self._see_whole(self._runs(each, each.fetched))
            each.fetched += 1
        if each.fetched > before:
            each.lane.block.set_count(SHM_FETCHED_OFFSET, self._feed.turn, each.fetched)

    def _see_whole(self, runs: npt.NDArray[np.void]) -> None:
        """What was read is of the promised version."""
        size_bytes = 0
        for number in np.unique(runs["segment"]).tolist():
            if number in self._sources:
                self._sources[number].check()
                of_segment = runs["segment"] == number
                size_bytes += int(runs["size_bytes"][of_segment].sum())
        if size_bytes:
            self._copied.follow(size_bytes)

    # -- broadcasts

    def _broadcast(self) -> None:
        while self._next < len(self._order):
            bucket, each = self._order[self._next]
            lane, event = each.lane, 0
            admitted = lane.block.count(SHM_ADMITTED_OFFSET, self._feed.turn)
            if each.fetched <= bucket or admitted <= bucket:
                return
            size_bytes = self._part_bytes(lane.fill, bucket)
            if size_bytes:
                assert lane.group is not None
                address = lane.address + bucket % self._feed.slots * self._plan.bucket_bytes
                root = (bucket + lane.fill.number) % lane.fill.size
                lane.group.broadcast(
                    address, size_bytes, root, self._broadcasting, check=self._go_on
                )
                event = self._cuda.record_event(self._device, self._broadcasting)
            each.broadcasts.append(event)
            each.sent = bucket + 1
            self._next += 1

    def _see_broadcasts(self, each: _Progress) -> None:
        before = each.filled
        if each.lane.group is None:
            each.filled = each.fetched
        else:
            while each.broadcasts and self._is_over(each.broadcasts[0]):
                self._forget(each.broadcasts.popleft())
                each.filled += 1
            if each.broadcasts:
                each.lane.group.check()
        if each.filled > before:
            each.lane.block.set_count(SHM_FILLED_OFFSET, self._feed.turn, each.filled)

    # -- helpers

    def _runs(self, each: _Progress, bucket: int) -> npt.NDArray[np.void]:
        """Those of a bucket that this worker is the root of."""
        fill = each.lane.fill
        if (bucket + fill.number) % fill.size != fill.place:
            return each.runs[:0]
        return self._plan.runs_of(bucket * self._plan.lanes + fill.lane)

    def _part_bytes(self, fill: LaneFill, bucket: int) -> int:
        return self._plan.part_bytes(bucket * self._plan.lanes + fill.lane)

    def _is_over(self, event: int) -> bool:
        return not event or self._cuda.is_event_done(self._device, event)

    def _forget(self, event: int) -> None:
        if event:
            self._cuda.destroy_event(self._device, event)


def root_runs(plan: BucketPlan, fill: LaneFill) -> npt.NDArray[np.void]:
    """[r] of `RUN`: those of the parts of a lane that its filler is the root of."""
    bucket, lane = np.divmod(plan.runs["part"], max(1, plan.lanes))
    is_root = (bucket + fill.number) % fill.size == fill.place
    runs: npt.NDArray[np.void] = plan.runs[(lane == fill.lane) & is_root]
    return runs
