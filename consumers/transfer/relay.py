"""Answers one worker's requests for windows of segments, by fetching them into its block.

Owns nothing. The worker chooses window and slot; a request is under way until the block says that
it is answered, and there is one at a time.
"""

from __future__ import annotations

import time

import anyio

from weightbus.consumers.errors import WorkerLost
from weightbus.consumers.transfer.fetch import Fetcher, Read
from weightbus.consumers.transfer.pipeline import FIRST_POLL_S, LONGEST_POLL_S
from weightbus.consumers.transfer.staging import Request, StagingBlock
from weightbus.consumers.transfer.timing import Timing
from weightbus.schemas.layout import Layout

__all__ = ("run_relay",)


async def run_relay(
    block: StagingBlock,
    layout: Layout,
    fetcher: Fetcher,
    *,
    rank: int,
    stall_s: float,
    timing: Timing,
) -> None:
    """Serve until cancelled: the worker says nothing when it has done. Whatever ends it, the block
    is given up.

    Args:
        block: it has begun this turn; its slots are as long as a window.
        timing: what the fetches took is added to it.

    Raises:
        WorkerLost: the worker asks for what there is not.
        SegmentUnavailable, TornRead, DeadlineExceeded: a window cannot be fetched.
    """
    answered = 0
    pause_s = FIRST_POLL_S
    try:
        while True:
            request = block.request(answered)
            if request is None:
                await anyio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_POLL_S)
                continue
            pause_s = FIRST_POLL_S
            read = _read(block, layout, request, rank)
            start_ns = time.time_ns()
            await fetcher.fetch([read], stall_s)
            timing.add(start_ns, read.size_bytes)
            answered = request.number
            block.filled(answered)
    finally:
        block.give_up()


def _read(block: StagingBlock, layout: Layout, request: Request, rank: int) -> Read:
    """A worker is trusted with its own parameters, not with the memory of its consumer."""
    sizes = layout.segments
    known = request.segment < len(sizes) and request.slot < block.slots
    begin = request.window * block.slot_bytes
    if not known or begin >= sizes[request.segment].size_bytes:
        raise WorkerLost(rank, f"it asked for what there is not: {request}")
    return Read(
        segment=request.segment,
        source=begin,
        address=block.slot_address(request.slot),
        size_bytes=min(block.slot_bytes, sizes[request.segment].size_bytes - begin),
    )
