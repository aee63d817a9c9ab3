"""The pipeline of lanes that lie in memory of GPUs: it keeps the order, and moves next to nothing.

Owns nothing. A lane's filler, a worker of this consumer's engine, copies what it can read itself
from its host's segments to the device, takes part in its group's broadcasts there, and counts what
it has done in words of the lane's block. Here is done what it cannot do: what only this consumer
reaches is fetched into the block's slots, from which the filler copies it; the members' roll calls
are made, ahead of the broadcasts, and what all are ready for is admitted; and who stands still is
named. Nothing but roll calls goes through the consumers' groups.

Invariants: as of `weightbus.consumers.transfer.pipeline`; a slot of the block is fetched into again
only when the filler has copied what was in it. The engine is paused before the first byte moves,
but not before all members of the groups are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Final

import anyio
import anyio.lowlevel

from weightbus.consumers.errors import PeerLost, WorkerLost
from weightbus.consumers.planning.buckets import BucketPlan
from weightbus.consumers.transfer.fetch import Fetcher, Read
from weightbus.consumers.transfer.filling import FillerWatch, Filling
from weightbus.consumers.transfer.pipeline import FINGERPRINT_BYTES, Lane, Pipeline
from weightbus.consumers.transfer.watch import BEGIN_S_PER_TENSOR, Reader
from weightbus.schemas.errors import WeightBusError

__all__ = ("DevicePipeline",)

EAGER_S: Final = 5e-3
"""Longer than a bucket takes; shorter than anything that an engine is waited for."""


class DevicePipeline(Pipeline):
    """One transfer through device lanes that this consumer owns. To be run once.

    Args:
        device: how they are filled; `lanes` have host slots if something is fetched for them.
        lanes, readers, turn, stall_s, fingerprint, leave: as of `Pipeline`.
    """

    begins_paused: ClassVar[bool] = True

    def __init__(
        self,
        lanes: Sequence[Lane],
        plan: BucketPlan,
        fetcher: Fetcher,
        readers: Sequence[Reader],
        device: Filling,
        *,
        turn: int,
        stall_s: float,
        fingerprint: bytes = bytes(FINGERPRINT_BYTES),
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            lanes,
            plan,
            fetcher,
            readers,
            turn=turn,
            stall_s=stall_s,
            fingerprint=fingerprint,
            leave=leave,
        )
        self._slots, self._brought = device.slots, device.brought
        assert not self._brought or all(lane.block.slots == device.slots for lane in lanes)
        self._in_groups = any(lane.group is not None for lane in lanes)
        self._tasks = (self._stage, self._admit, self._follow)
        begin_s = BEGIN_S_PER_TENSOR * len(plan.layout.tensors)
        self._fillers = {
            lane.number: FillerWatch(lane.block, lane.rank, stall_s, begin_s) for lane in lanes
        }
        self._admitted = dict.fromkeys(self._fillers, -1)
        """Lane -> all members are ready for so many buckets; -1: they have not met yet."""

    def misses(self, others: Sequence[str], reason: str) -> bool:
        return any(name in reason for name in others)  # fillers read segments themselves, too

    async def _stage(self, lane: Lane) -> None:
        """What the filler does not read itself of this member's parts, as early as there is room.
        If it fails, that is left to `_admit`, which tells the other members."""
        filler = self._fillers[lane.number]
        try:
            for bucket in range(self._plan.buckets):
                if reads := self._reads(lane, bucket) if lane.is_root(bucket) else ():
                    await self._until(partial(filler.has_fetched, bucket - self._slots))
                    await self._bring(lane, reads)
                lane.fetched = bucket + 1
                lane.block.staged(lane.fetched)
                self._look_if_primed()
        except WeightBusError as error:
            lane.failure = error

    async def _admit(self, lane: Lane) -> None:
        """Every bucket, in order: it may be broadcast once all members are ready for it."""
        group = lane.group
        if group is not None:
            await self._compare(group)
        self._admitted[lane.number] = 0
        self._look_if_primed()
        for bucket in range(self._plan.buckets):
            if group is None:
                await self._until(partial(self._is_ready, lane, bucket))
            else:
                await self._until_all_are_ready(lane, group, bucket)
                lane.broadcast.begin()
            self._admitted[lane.number] = bucket + 1
            lane.block.admitted(bucket + 1)

    async def _follow(self, lane: Lane) -> None:
        """Every bucket, in order: wait until its filler says that it can be read."""
        for bucket in range(self._plan.buckets):
            await self._until(partial(self._is_filled, lane, bucket))
            if lane.group is not None:
                size_bytes = self._plan.part_bytes(bucket * self._plan.lanes + lane.number)
                lane.broadcast.follow(size_bytes)
            lane.filled = bucket + 1

    def _is_filled(self, lane: Lane, bucket: int) -> bool:
        """
        Raises:
            WorkerLost: its filler stands still.
            PeerLost: all members were ready for it, and one stands still; it may be ours, which is
                the `suspect` then.
        """
        filler = self._fillers[lane.number]
        if filler.has_filled(bucket):
            return True
        try:
            filler.check("fill", is_to_move=self._least_admitted(lane.rank) > bucket)
        except WorkerLost as error:
            group = lane.group
            if group is None:
                raise
            self.suspect = error
            reason = f"the broadcast of bucket {bucket} stands still, for which all were ready"
            raise PeerLost(group.id, group.others, reason) from None
        return False

    def _least_admitted(self, rank: int) -> int:
        """Of all lanes that a worker fills: it keeps one order of buckets and lanes, and so waits
        in one lane for what is admitted in another."""
        return min(self._admitted[lane.number] for lane in self.lanes if lane.rank == rank)

    def _is_ready(self, lane: Lane, bucket: int) -> bool:
        """Members that only receive a bucket have a filler that has begun, too: nobody waits in a
        broadcast for an engine to pause."""
        if lane.failure is not None:
            raise lane.failure
        if not self._has_room(lane, bucket):
            return False
        filler = self._fillers[lane.number]
        if filler.has_fetched(bucket):
            return True
        filler.check("fetch", is_to_move=self._watch.told and lane.fetched > bucket)
        return False

    def _reads(self, lane: Lane, bucket: int) -> list[Read]:
        """What this consumer fetches; the filler reads the rest itself."""
        if not self._brought:
            return []
        return [read for read in super()._reads(lane, bucket) if read.segment in self._brought]

    async def _until(self, condition: Callable[[], bool]) -> None:
        """A bucket takes a millisecond, and so does the event loop's shortest sleep: where buckets
        wait to be admitted, they are looked at again at once for a while."""
        eager_end = anyio.current_time() + (EAGER_S if self._in_groups else 0.0)
        while not condition():
            if anyio.current_time() >= eager_end:
                await super()._until(condition)
                return
            await anyio.lowlevel.checkpoint()

    def _look_if_primed(self) -> None:
        ahead = min(self._slots, self._plan.buckets)
        if all(lane.fetched >= ahead and self._admitted[lane.number] >= 0 for lane in self.lanes):
            self.primed.set()
