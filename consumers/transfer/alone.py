"""Staging for one engine alone: a lane for each of its ranks, all filled by this consumer.

Owns nothing. Used where no other host and no other engine takes part: files of this host, and
segments that are read from other hosts by whoever needs them.
"""

from __future__ import annotations

from weightbus.bus.blocks import SHM_DIRECTORY
from weightbus.bus.errors import SharedMemoryFull
from weightbus.consumers.planning.buckets import MIN_BUCKET_BYTES
from weightbus.consumers.planning.staging import StagingSize, fit_staging
from weightbus.consumers.transfer.fetch import Fetcher
from weightbus.consumers.transfer.pipeline import Lane, Reader
from weightbus.consumers.transfer.route import Transfer
from weightbus.consumers.transfer.staged import (
    Clock,
    Staging,
    bring,
    bring_by_relay,
    bring_by_stream,
    open_blocks,
)
from weightbus.consumers.transfer.staging import BlockPool, BlockSpec
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES
from weightbus.schemas.worker import Applied

__all__ = ("bring_alone", "stream_alone")

_PAGE_BYTES = 4096


async def bring_alone(
    transfer: Transfer, fetcher: Fetcher, staging: Staging, deadline_s: float
) -> tuple[Applied, ...]:
    """By stream, if the engine is proven and does not find otherwise; else by relay.

    Raises:
        SharedMemoryFull, SharedMemoryUnavailable: there is no room for staging.
        ApplyFailed, WorkerLost, SegmentUnavailable, TornRead, DeadlineExceeded
    """

    async def by_stream(left_s: float) -> tuple[Applied, ...]:
        return await stream_alone(transfer, fetcher, staging, left_s)

    async def by_relay(left_s: float) -> tuple[Applied, ...]:
        return await _relay_alone(transfer, fetcher, staging, left_s)

    return await bring(transfer, by_stream, by_relay, deadline_s)


async def stream_alone(
    transfer: Transfer, fetcher: Fetcher, staging: Staging, deadline_s: float
) -> tuple[Applied, ...]:
    """As `bring_alone`, by stream only.

    Raises:
        ApplyFailed: with cause `ProofNeeded`: it has to be brought in another way.
    """
    clock, pool, ranks = Clock("reload", deadline_s), staging.pool, transfer.ranks
    share = sum(segment.size_bytes for segment in transfer.layout.segments) // len(ranks)
    slots, bucket_bytes = _fit(transfer, pool, share + share // 16)
    plan = await staging.plan(transfer, bucket_bytes, len(ranks))
    specs = [BlockSpec(pool.name_of(f"{rank}.lane"), slots, bucket_bytes) for rank in ranks]
    async with open_blocks(pool, specs, fetcher) as blocks:
        return await bring_by_stream(
            transfer,
            fetcher,
            plan,
            [
                Lane(number=number, block=block, rank=rank)
                for number, (block, rank) in enumerate(zip(blocks, ranks, strict=True))
            ],
            [block.name for block in blocks],
            [Reader(f"rank {rank}", rank, own=True) for rank in ranks],
            turn=pool.next_turn(),
            stall_s=staging.stall_s,
            deadline_s=clock.left_s(),
        )


async def _relay_alone(
    transfer: Transfer, fetcher: Fetcher, staging: Staging, deadline_s: float
) -> tuple[Applied, ...]:
    clock, pool, ranks = Clock("reload", deadline_s), staging.pool, transfer.ranks
    largest = max((segment.size_bytes for segment in transfer.layout.segments), default=0)
    slots, window_bytes = _fit(transfer, pool, largest)
    specs = [BlockSpec(pool.name_of(f"{rank}.relay"), slots, window_bytes) for rank in ranks]
    async with open_blocks(pool, specs, fetcher) as blocks:
        return await bring_by_relay(
            transfer,
            fetcher,
            dict(zip(ranks, blocks, strict=True)),
            turn=pool.next_turn(),
            stall_s=staging.stall_s,
            deadline_s=clock.left_s(),
        )


def _fit(transfer: Transfer, pool: BlockPool, useful_bytes: int) -> tuple[int, int]:
    """(slots, bytes of a slot) for each rank: as the plan says, or less where there is less room,
    or less to bring.

    Raises:
        SharedMemoryFull: there is no room for one slot of the smallest size.
    """
    useful_bytes = max(MIN_BUCKET_BYTES, useful_bytes)
    slot_bytes = min(transfer.plan.bucket_bytes, -(-useful_bytes // _PAGE_BYTES) * _PAGE_BYTES)
    room_bytes = pool.room_bytes // len(transfer.ranks) - SHM_HEADER_BYTES
    if room_bytes < min(slot_bytes, _PAGE_BYTES):
        need_bytes = len(transfer.ranks) * (_PAGE_BYTES + SHM_HEADER_BYTES)
        raise SharedMemoryFull(str(SHM_DIRECTORY), need_bytes, pool.room_bytes)
    full = StagingSize(bucket_bytes=slot_bytes, slots=transfer.plan.slots)
    fitting = fit_staging(room_bytes, full, min(slot_bytes, _PAGE_BYTES))
    return fitting.slots, fitting.bucket_bytes
