"""Steps of a pipeline that a test may hold, who takes them, and small plans."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import anyio

from weightbus.consumers.errors import ConsumerError, PeerLost
from weightbus.consumers.planning.buckets import BucketPlan, plan_buckets
from weightbus.consumers.transfer.exchange import LEAVING, READY, WAITING, Exchange
from weightbus.consumers.transfer.fetch import Fetcher, Read
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec

__all__ = ("BUCKET_BYTES", "DEADLINE_S", "StepExchange", "StepFetcher", "Steps", "plan_of")

DEADLINE_S = 20.0
BUCKET_BYTES = 4096


def plan_of(buckets: int, lanes: int = 1) -> BucketPlan:
    """A plan of so many buckets."""
    size = 3500 * buckets * lanes
    layout = Layout(
        (TensorSpec("t", "U8", (size,)),),
        (ShardSpec(0, (0,), (size,), 0, 0),),
        (SegmentSpec(size),),
    )
    plan = plan_buckets(layout, BUCKET_BYTES, lanes)
    assert plan.buckets == buckets
    return plan


class Steps:
    """Steps that a test may hold, and wait for."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.held: dict[str, anyio.Event] = {}
        self._changed = anyio.Event()

    def hold(self, step: str) -> anyio.Event:
        return self.held.setdefault(step, anyio.Event())

    async def take(self, step: str) -> None:
        self.begun.append(step)
        self._changed.set()
        self._changed = anyio.Event()
        if step in self.held:
            await self.held[step].wait()

    async def until(self, *steps: str) -> None:
        with anyio.fail_after(DEADLINE_S):
            while not set(steps) <= set(self.begun):
                await self._changed.wait()


class StepFetcher(Fetcher):
    """Counts the buckets it is asked for, and writes their number."""

    def __init__(self, steps: Steps, buckets: Sequence[int]) -> None:
        self._steps, self._buckets = steps, iter(buckets)
        self.checks: list[Callable[[int], None]] = []
        self.error: ConsumerError | None = None
        self.reads: list[Read] = []
        """All that were asked for."""

    async def fetch(self, reads: Sequence[Read], deadline_s: float) -> None:
        bucket = next(self._buckets)
        self.reads.extend(reads)
        for check in self.checks:
            check(bucket)
        await self._steps.take(f"fetch {bucket}")
        if self.error is not None:
            raise self.error
        for read in reads:
            ctypes.memset(read.address, bucket + 1, read.size_bytes)

    async def check(self, deadline_s: float) -> None: ...

    def writing(self) -> bool:
        return False

    async def adopt(self, address: int, size_bytes: int) -> None: ...

    async def release(self, address: int) -> None: ...


class StepExchange(Exchange):
    """One of two members; the other does what it is told."""

    def __init__(self, steps: Steps, place: int = 0) -> None:
        self.id, self.place, self.size, self.others = "g", place, 2, ("other/0",)
        self._steps = steps
        self.other_is_ready = True
        self.other_says: dict[int, bytes] = {}
        """By length: what it says instead."""
        self.said: list[bytes] = []
        self.error: PeerLost | None = None
        self._bucket = 0

    async def roll_call(self, answer: bytes, deadline_s: float) -> tuple[bytes, ...]:
        await anyio.lowlevel.checkpoint()
        self.said.append(answer)
        if answer == LEAVING:
            await self._steps.take("leave")
        other = answer
        if len(answer) == 1:
            other = READY if self.other_is_ready else WAITING
        other = self.other_says.get(len(answer), other)
        return (answer, other) if self.place == 0 else (other, answer)

    async def broadcast(self, address: int, size_bytes: int, root: int, stall_s: float) -> None:
        bucket, self._bucket = self._bucket, self._bucket + 1
        assert root == bucket % 2
        await self._steps.take(f"broadcast {bucket}")
        if self.error is not None:
            raise self.error
        if root == self.place:
            assert ctypes.string_at(address, 1) == bytes([bucket + 1])

    def writing(self) -> bool:
        return False
