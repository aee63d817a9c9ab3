"""The common flow of routes whose bytes go through staging of this consumer.

Owns nothing beyond one transfer. The slots are filled first, then the engine is paused, then its
workers are told to read: as late as can be.

Invariants: the error that is raised is the first cause, not what followed from it; whatever fails,
the workers stop at once, and blocks that something may still write to are never used again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import anyio
import anyio.to_thread
from msgspec import structs

from weightbus.bus.errors import NcclFailed
from weightbus.consumers.errors import (
    ApplyFailed,
    ConsumerError,
    DeadlineExceeded,
    PeerLost,
    ProofNeeded,
    RouteUnavailable,
    SegmentUnavailable,
    cause_of,
)
from weightbus.consumers.planning.buckets import BUCKETS_VERSION, BucketPlan, plan_buckets
from weightbus.consumers.transfer.device_pipeline import DevicePipeline
from weightbus.consumers.transfer.fetch import Fetcher
from weightbus.consumers.transfer.filling import Filling
from weightbus.consumers.transfer.pipeline import (
    FINGERPRINT_BYTES,
    Lane,
    Pipeline,
    Reader,
)
from weightbus.consumers.transfer.preparing import prepare_ranks
from weightbus.consumers.transfer.relay import run_relay
from weightbus.consumers.transfer.route import Transfer
from weightbus.consumers.transfer.staging import BlockPool, BlockSpec, StagingBlock
from weightbus.consumers.transfer.timing import Timing
from weightbus.schemas.base import Stage
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.worker import Applied, Feed, Relay, StageTiming, Stream

__all__ = (
    "Clock",
    "Staging",
    "apply_checked",
    "bring",
    "bring_by_relay",
    "bring_by_stream",
    "open_blocks",
)

RELEASE_S: Final = 5.0
"""For taking back from the fetcher what it has adopted."""

SERVE_SHARE: Final = 0.95
"""Of the time that is left: the rest is for telling who was waited for in vain."""

PLANS_KEPT: Final = 4
"""Plans of buckets that are kept: layouts come and go seldom."""


_LASTING: Final = frozenset({PeerLost.__name__, RouteUnavailable.__name__, NcclFailed.__name__})
"""What a worker says that prepares, and will say again: communicators are tried once for a plan."""


class Clock:
    """What is left of one transfer's budget."""

    def __init__(self, stage: Stage, deadline_s: float) -> None:
        self._stage, self._deadline_s = stage, deadline_s
        self._end = anyio.current_time() + deadline_s

    def left_s(self) -> float:
        """
        Raises:
            DeadlineExceeded: nothing is left.
        """
        left_s = self._end - anyio.current_time()
        if left_s <= 0:
            raise DeadlineExceeded(self._stage, self._deadline_s)
        return left_s


class Staging:
    """What a consumer has for staging, whatever the route: blocks, and plans of buckets.

    Args:
        stall_s: how long a step of a transfer may stand still.
    """

    def __init__(self, pool: BlockPool, stall_s: float) -> None:
        self.pool, self.stall_s = pool, stall_s
        self._plans: OrderedDict[tuple[str, int, int], BucketPlan] = OrderedDict()

    async def plan(self, transfer: Transfer, bucket_bytes: int, lanes: int) -> BucketPlan:
        """How a layout is cut; planned once.

        Raises:
            PlanError: the slots are too small.
        """
        key = transfer.layout_digest, bucket_bytes, lanes
        known = self._plans.get(key)
        if known is None:
            known = await anyio.to_thread.run_sync(
                plan_buckets, transfer.layout, bucket_bytes, lanes
            )
        self._plans[key] = known
        self._plans.move_to_end(key)
        if len(self._plans) > PLANS_KEPT:
            self._plans.popitem(last=False)
        return known


@asynccontextmanager
async def open_blocks(
    pool: BlockPool,
    specs: Sequence[BlockSpec],
    fetcher: Fetcher,
    writing: Callable[[], bool] = lambda: False,
) -> AsyncIterator[tuple[StagingBlock, ...]]:
    """Staging blocks for one transfer, adopted by its fetcher. If it fails they are condemned.

    Args:
        writing: whether something beside the fetcher may still write to them after a failure.

    Raises:
        SharedMemoryFull, SharedMemoryUnavailable: they cannot be made.
        SegmentUnavailable: they cannot be adopted.
    """
    blocks = await anyio.to_thread.run_sync(pool.take, specs)
    well = False
    try:
        for block in blocks:
            if block.size_bytes:
                await fetcher.adopt(block.address, block.size_bytes)
        yield blocks
        well = True
    finally:
        with anyio.move_on_after(RELEASE_S, shield=True):
            for block in blocks:
                if block.size_bytes:
                    await fetcher.release(block.address)
        if well and not fetcher.writing():
            pool.give_back(blocks)
        else:
            pool.condemn(blocks, lambda: fetcher.writing() or writing())


async def apply_checked(
    transfer: Transfer, feeds: Mapping[int, Feed], deadline_s: float
) -> tuple[Applied, ...]:
    """`Engine.apply`, in the order of `transfer.ranks`.

    Raises:
        ApplyFailed: also when a worker answers for another rank or version.
    """
    applied = await transfer.engine.apply(
        transfer.version,
        transfer.layout_digest,
        {rank: feeds[rank] for rank in transfer.ranks},
        deadline_s,
    )
    for rank, reply in zip(transfer.ranks, applied, strict=True):
        if (reply.rank, reply.version) != (rank, transfer.version):
            reason = f"answered for rank {reply.rank} and version {reply.version}"
            raise ApplyFailed(rank, "PeerProtocolError", reason, touched=True)
    return applied


async def bring_by_stream(
    transfer: Transfer,
    fetcher: Fetcher,
    plan: BucketPlan,
    lanes: Sequence[Lane],
    names: Sequence[str],
    readers: Sequence[Reader],
    *,
    turn: int,
    stall_s: float,
    deadline_s: float,
    device: Filling | None = None,
    leave: Callable[[], None] = lambda: None,
) -> tuple[Applied, ...]:
    """Every byte once, through lanes of which this consumer owns some or all.

    Args:
        names: of the blocks of all lanes of this host, in the lanes' order.
        readers: all workers of this host; the numbers of this engine's ranks are looked up here.
        device: the lanes are device lanes, and how they are filled.
        leave: see `Pipeline`.

    Raises:
        ApplyFailed: with cause `ProofNeeded`: it has to be brought by relay instead.
        PeerLost: another member, or another consumer of this host, cannot go on.
        WorkerLost, SegmentUnavailable, TornRead, DeadlineExceeded
    """
    clock = Clock("reload", deadline_s)
    number_of = {reader.rank: number for number, reader in enumerate(readers) if reader.own}
    feeds = {
        rank: Stream(
            lanes=tuple(names),
            bucket_bytes=plan.bucket_bytes,
            slots=lanes[0].block.slots,
            turn=turn,
            reader=number_of[rank],
        )
        for rank in transfer.ranks
    }
    if device is not None:
        feeds = {
            rank: structs.replace(
                feed,
                slots=device.slots,
                device=True,
                fills=device.fills.get(rank, ()),
                sources=device.sources,
                readers=len(readers),
            )
            for rank, feed in feeds.items()
        }
    kind = Pipeline if device is None else partial(DevicePipeline, device=device)
    pipeline = kind(
        lanes,
        plan,
        fetcher,
        readers,
        turn=turn,
        stall_s=stall_s,
        fingerprint=_fingerprint(transfer.layout_digest, plan, on_device=device is not None),
        leave=leave,
    )

    async def serve() -> None:
        await pipeline.run(SERVE_SHARE * clock.left_s())

    def go_on(error: WeightBusError) -> bool:
        """Others do not suffer from what only this engine needs; of device lanes its workers have
        filled theirs to the end."""
        return _needs_proof(error) and pipeline.is_shared

    try:
        applied = await _beside(transfer, feeds, clock, [serve], stall_s, pipeline, go_on)
    except ApplyFailed as error:
        raise _first_cause(error, pipeline, names) from error
    await _check(fetcher, clock)
    return _with_stages(applied, pipeline.timings)


async def bring_by_relay(
    transfer: Transfer,
    fetcher: Fetcher,
    blocks: Mapping[int, StagingBlock],
    *,
    turn: int,
    stall_s: float,
    deadline_s: float,
) -> tuple[Applied, ...]:
    """Windows on demand, each rank through a block of its own.

    Args:
        blocks: rank -> its block; a slot is a window.

    Raises:
        ApplyFailed, WorkerLost, SegmentUnavailable, TornRead, DeadlineExceeded
    """
    clock = Clock("reload", deadline_s)
    timings = {rank: Timing() for rank in transfer.ranks}
    feeds = {
        rank: Relay(
            block=blocks[rank].name,
            window_bytes=blocks[rank].slot_bytes,
            slots=blocks[rank].slots,
            turn=turn,
        )
        for rank in transfer.ranks
    }
    serves = [
        partial(
            run_relay,
            blocks[rank],
            transfer.layout,
            fetcher,
            rank=rank,
            stall_s=stall_s,
            timing=timings[rank],
        )
        for rank in transfer.ranks
    ]
    for rank in transfer.ranks:
        blocks[rank].begin(turn)
    applied = await _beside(transfer, feeds, clock, serves, stall_s)
    await _check(fetcher, clock)
    return _with_stages(applied, lambda rank: timings[rank].told("fetch"))


async def bring(
    transfer: Transfer,
    by_stream: Callable[[float], Awaitable[tuple[Applied, ...]]],
    by_relay: Callable[[float], Awaitable[tuple[Applied, ...]]],
    deadline_s: float,
) -> tuple[Applied, ...]:
    """By stream where the engine is proven, else, or if it finds that it is not, by relay: within
    one deadline. Both are called with the seconds that are left.

    Raises:
        What they raise.
    """
    clock = Clock("reload", deadline_s)
    if transfer.proven:
        try:
            return await by_stream(clock.left_s())
        except ApplyFailed as error:
            if not _needs_proof(error):
                raise
    return await by_relay(clock.left_s())


async def _beside(
    transfer: Transfer,
    feeds: Mapping[int, Feed],
    clock: Clock,
    serves: Sequence[Callable[[], Awaitable[None]]],
    stall_s: float,
    pipeline: Pipeline | None = None,
    go_on: Callable[[WeightBusError], bool] = lambda _: False,
) -> tuple[Applied, ...]:
    """Pause the engine and let its workers read, beside the tasks that serve them.

    Args:
        stall_s: workers that are not served any more may take so long to say so: who stands still
            never does.
        pipeline: the engine is not paused before it is primed; None: the tasks only end when they
            are cancelled.
        go_on: whether the tasks shall run to their end although the engine failed like this.

    Raises:
        What failed first: a task, or the engine.
    """
    failures: list[WeightBusError] = []
    applied: tuple[Applied, ...] = ()
    touched = False
    entering, applying = anyio.CancelScope(), anyio.CancelScope()

    async def run(serve: Callable[[], Awaitable[None]]) -> None:
        try:
            await serve()
        except WeightBusError as error:
            failures.append(error)
            entering.cancel()
            applying.deadline = anyio.current_time() + stall_s

    async with anyio.create_task_group() as tasks:
        for serve in serves:
            tasks.start_soon(run, serve)
        try:
            with entering:
                if pipeline is not None:
                    await pipeline.begun.wait()
                    _check_prepared(await prepare_ranks(transfer, feeds, clock.left_s))
                    await pipeline.primed.wait()
                await transfer.begin_write()
            if not failures:
                left_s = clock.left_s()
                touched = True
                if pipeline is not None:
                    pipeline.tell()
                with applying:
                    applied = await apply_checked(transfer, feeds, left_s)
        except WeightBusError as error:
            if isinstance(error, ApplyFailed):
                touched = error.touched
            failures.append(error)
            ends = go_on(error)
        else:
            ends = pipeline is not None and not failures
        if not ends:
            tasks.cancel_scope.cancel()
    if applying.cancelled_caught and pipeline is not None and pipeline.suspect is not None:
        failures.insert(0, pipeline.suspect)
    if failures:
        raise _touching(failures[0]) if touched else failures[0]
    return applied


def _check_prepared(reasons: Mapping[int, str]) -> None:
    """Where workers do not come together they will not do so for this plan: no engine is paused.

    Args:
        reasons: of `prepare_ranks`.

    Raises:
        ApplyFailed: as the rank would fail.
    """
    for rank, said in reasons.items():
        cause, _, reason = said.partition(": ")
        if cause in _LASTING:
            raise ApplyFailed(rank, cause, reason, touched=False)


def _fingerprint(layout_digest: str, plan: BucketPlan, *, on_device: bool) -> bytes:
    """Of all that says which bytes go where: equal on hosts that cut a version alike."""
    shape = f"{plan.bucket_bytes} {plan.lanes} {plan.buckets}{' on devices' * on_device}"
    said = f"{BUCKETS_VERSION} {layout_digest} {shape}"
    return hashlib.sha256(said.encode()).digest()[:FINGERPRINT_BYTES]


async def _check(fetcher: Fetcher, clock: Clock) -> None:
    """What the workers were given, and have applied by now, was of the promised version."""
    try:
        await fetcher.check(clock.left_s())
    except WeightBusError as error:
        raise _touching(error) from error.__cause__


def _touching(error: WeightBusError) -> WeightBusError:
    """The same error, of a transfer that may have written to a live parameter."""
    if isinstance(error, ConsumerError):
        error.touched = True
    return error


def _first_cause(error: ApplyFailed, pipeline: Pipeline, names: Sequence[str]) -> WeightBusError:
    """While lanes of ours are well, a worker can only miss those of another consumer, or members of
    the groups that it broadcasts in."""
    own = {lane.block.name for lane in pipeline.lanes}
    others = [name for name in names if name not in own]
    if error.cause == PeerLost.__name__:
        groups = [group for lane in pipeline.lanes if (group := lane.group) is not None]
        members = sorted({name for group in groups for name in group.others})
        lost = PeerLost(" and ".join(group.id for group in groups), members, error.reason)
    elif error.cause == SegmentUnavailable.__name__ and pipeline.misses(others, error.reason):
        lost = PeerLost("of this host's lanes", others, error.reason)
    else:
        return error
    return _touching(lost) if error.touched else lost


def _needs_proof(error: WeightBusError) -> bool:
    return cause_of(error) == ProofNeeded.__name__


def _with_stages(
    applied: Sequence[Applied], stages_of: Callable[[int], tuple[StageTiming, ...]]
) -> tuple[Applied, ...]:
    """What the consumer did for a rank comes before what its worker did."""
    return tuple(
        structs.replace(reply, stages=(*stages_of(reply.rank), *reply.stages)) for reply in applied
    )
