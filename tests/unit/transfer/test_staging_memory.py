"""Staging takes no more memory than is stated, however large the version is.

Measured from outside: files below /dev/shm, and the resident memory of this process.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import anyio
import pytest

from tests.unit.transfer.words import open_words
from weightbus.consumers.planning.buckets import BucketPlan, plan_buckets
from weightbus.consumers.transfer.fetch import Fetcher, LocalSegments, Read, open_fetcher
from weightbus.consumers.transfer.pipeline import Lane, Pipeline, Reader
from weightbus.consumers.transfer.staged import open_blocks
from weightbus.consumers.transfer.staging import BlockPool, BlockSpec
from weightbus.schemas.layout import Layout, SegmentSpec, ShardSpec, TensorSpec
from weightbus.schemas.placement import FileSegment
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES

pytestmark = pytest.mark.anyio

MIB = 2**20
VERSION_BYTES = 512 * MIB
BUCKET_BYTES = 16 * MIB
SLOTS, LANES = 2, 2
BOUND_BYTES = SLOTS * BUCKET_BYTES * LANES
SLACK_BYTES = 24 * MIB
"""Of the process: threads, and what they allocate."""
DEADLINE_S = 120.0
TURN = 1


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def shared_bytes(prefix: str) -> int:
    return sum(block.stat().st_size for block in Path("/dev/shm").glob(f"{prefix}*"))


class Meter(Fetcher):
    """Measures at every fetch what there is."""

    def __init__(self, inner: Fetcher, prefix: str) -> None:
        self._inner, self._prefix = inner, prefix
        self.shared_bytes: list[int] = []
        self.resident_bytes: list[int] = []
        self.fetched_bytes = 0

    async def fetch(self, reads: Sequence[Read], deadline_s: float) -> None:
        await self._inner.fetch(reads, deadline_s)
        self.fetched_bytes += sum(read.size_bytes for read in reads)
        self.shared_bytes.append(shared_bytes(self._prefix))
        self.resident_bytes.append(resident_bytes())

    async def check(self, deadline_s: float) -> None:
        await self._inner.check(deadline_s)

    def writing(self) -> bool:
        return self._inner.writing()

    async def adopt(self, address: int, size_bytes: int) -> None:
        await self._inner.adopt(address, size_bytes)

    async def release(self, address: int) -> None:
        await self._inner.release(address)


@contextmanager
def reading(names: Sequence[str], plan: BucketPlan) -> Iterator[None]:
    """A reader that maps nothing: it only says that it has done with what is filled."""
    ended = threading.Event()

    def read() -> None:
        for bucket in range(plan.buckets):
            while min(block.filled(TURN) for block in blocks) <= bucket:
                if ended.wait(1e-4):
                    return
            for block in blocks:
                block.say_done(0, TURN, bucket + 1)

    with ExitStack() as stack:
        blocks = [stack.enter_context(open_words(name)) for name in names]
        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(DEADLINE_S)


async def test_staging_stays_within_its_bound_when_a_large_version_streams(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    with path.open("wb") as file:
        file.truncate(VERSION_BYTES)
    layout = Layout(
        (TensorSpec("t", "U8", (VERSION_BYTES,)),),
        (ShardSpec(0, (0,), (VERSION_BYTES,), 0, 0),),
        (SegmentSpec(VERSION_BYTES),),
    )
    plan = plan_buckets(layout, BUCKET_BYTES, LANES)
    pool = BlockPool(f"test-{uuid.uuid4().hex[:8]}.e", BOUND_BYTES + LANES * SHM_HEADER_BYTES)
    local = LocalSegments("host", [str(tmp_path)])
    specs = [BlockSpec(pool.name_of(str(lane)), SLOTS, BUCKET_BYTES) for lane in range(LANES)]
    before = resident_bytes()
    async with open_fetcher([FileSegment(path=str(path))], layout, local, DEADLINE_S) as inner:
        meter = Meter(inner, pool.name_of(""))
        async with open_blocks(pool, specs, meter) as blocks:
            lanes = [Lane(number=n, block=block, rank=n) for n, block in enumerate(blocks)]
            readers = [Reader("e/0", 0, own=True)]
            pipeline = Pipeline(lanes, plan, meter, readers, turn=TURN, stall_s=DEADLINE_S)
            with reading([block.name for block in blocks], plan), anyio.fail_after(DEADLINE_S):
                await pipeline.run(DEADLINE_S)
        assert pool.total_bytes <= BOUND_BYTES + LANES * SHM_HEADER_BYTES
    assert meter.fetched_bytes == VERSION_BYTES
    assert max(meter.shared_bytes) <= BOUND_BYTES + LANES * SHM_HEADER_BYTES
    growth = max(meter.resident_bytes) - before
    assert growth <= BOUND_BYTES + SLACK_BYTES, f"{growth / MIB:.0f} MiB"
    pool.close()
    local.close()
