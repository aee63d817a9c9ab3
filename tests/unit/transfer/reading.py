"""An engine whose workers are threads: they read what they are fed, and keep it.

What a worker has read is the bytes of every shard, by tensor and box; no plan of an engine takes
part.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NoReturn

import anyio.to_thread

from weightbus.consumers.engines.engine import Engine, EngineReport
from weightbus.consumers.errors import ApplyFailed, ConsumerError
from weightbus.consumers.planning.buckets import plan_buckets
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.transfer.lanes import Lanes, StagingCache
from weightbus.consumers.transfer.relayed import OpenRelayed, RelayReader
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.layout import Layout, ShardSpec
from weightbus.schemas.layout_codec import tensor_bytes
from weightbus.schemas.worker import (
    Applied,
    Attached,
    Cell,
    Described,
    Feed,
    Inspected,
    Relay,
    StageTiming,
    Stream,
)

__all__ = ("Held", "ThreadEngine", "shard_bytes", "shard_key", "shards_of")

DEADLINE_S = 30.0

Key = tuple[int, tuple[int, ...], tuple[int, ...]]
Held = dict[Key, bytes]


def shard_key(shard: ShardSpec) -> Key:
    return shard.tensor, shard.starts, shard.sizes


def shards_of(layout: Layout, segments: Sequence[bytes | bytearray]) -> Held:
    """The bytes of every shard of a layout."""
    return {
        shard_key(shard): bytes(
            segments[shard.segment][shard.offset_bytes : shard.offset_bytes + size]
        )
        for shard in layout.shards
        if (size := shard_bytes(layout, shard))
    }


def shard_bytes(layout: Layout, shard: ShardSpec) -> int:
    """Of a shard."""
    whole = layout.tensors[shard.tensor]
    box = type(whole)(whole.name, whole.dtype, shard.sizes)
    return tensor_bytes(box)


class ThreadEngine(Engine):
    """Every rank reads all bytes.

    Args:
        before: called in a worker's thread before it reads bucket (or request) n; may raise.
    """

    kind: ClassVar[str] = "thread"

    def __init__(
        self, layout: Layout, ranks: int = 1, before: Callable[[int, int], None] | None = None
    ) -> None:
        self._layout, self._ranks = layout, ranks
        self.before = before or (lambda rank, bucket: None)
        self.feeds: list[Mapping[int, Feed]] = []
        self.held: dict[int, Held] = {}
        self._caches = [StagingCache() for _ in range(ranks)]

    @property
    def ranks(self) -> int:
        return self._ranks

    def close(self) -> None:
        for cache in self._caches:
            cache.close()

    async def apply(
        self, version: int, layout_digest: str, feeds: Mapping[int, Feed], deadline_s: float
    ) -> tuple[Applied, ...]:
        self.feeds.append(feeds)
        failures: list[ApplyFailed] = []

        async def read(rank: int) -> None:
            try:
                await anyio.to_thread.run_sync(self._read, rank, feeds[rank], deadline_s)
            except WeightBusError as error:
                cause = type(error).__name__
                failures.append(ApplyFailed(rank, cause, str(error), touched=True))

        async with anyio.create_task_group() as tasks:
            for rank in feeds:
                tasks.start_soon(read, rank)
        if failures:
            raise failures[0]
        stage = StageTiming("reload", 1, 2, 3)
        return tuple(
            Applied(
                request=1, rank=rank, version=version, bytes=0, cell_digests=b"", stages=(stage,)
            )
            for rank in feeds
        )

    def _read(self, rank: int, feed: Feed, deadline_s: float) -> None:
        budget = Deadline("reload", deadline_s)
        if isinstance(feed, Stream):
            self.held[rank] = self._stream(rank, feed, budget)
        elif isinstance(feed, Relay):
            self.held[rank] = self._relay(rank, feed, budget)

    def _stream(self, rank: int, feed: Stream, budget: Deadline) -> Held:
        held: Held = {}
        plan = plan_buckets(self._layout, feed.bucket_bytes, len(feed.lanes))
        size_bytes = feed.slots * feed.bucket_bytes
        with self._caches[rank].open_all(feed.lanes, size_bytes, feed.turn, budget) as blocks:
            lanes = Lanes(blocks, feed, budget)
            shards: dict[int, list[ShardSpec]] = {}
            for shard in plan.layout.shards:
                shards.setdefault(shard.segment // plan.lanes, []).append(shard)
            try:
                for bucket in range(plan.buckets):
                    lanes.wait_filled(bucket)
                    self.before(rank, bucket)
                    for shard in shards.get(bucket, ()):
                        begin = bucket % feed.slots * feed.bucket_bytes + shard.offset_bytes
                        end = begin + shard_bytes(self._layout, shard)
                        block = blocks[shard.segment % plan.lanes]
                        held[shard_key(shard)] = bytes(block.data[begin:end])
                    lanes.done(bucket)
            except ConsumerError:
                for block in blocks:  # as a worker that leaves: nobody waits for it any more
                    block.set_word(256 + 8 * feed.reader, feed.turn << 32 | 0xFFFFFFFF)
                raise
        return held

    def _relay(self, rank: int, feed: Relay, budget: Deadline) -> Held:
        size_bytes = feed.slots * feed.window_bytes
        with self._caches[rank].open_all([feed.block], size_bytes, feed.turn, budget) as blocks:
            reader = RelayReader(blocks[0], feed, budget)
            segments = []
            for number, spec in enumerate(self._layout.segments):
                self.before(rank, number)
                data = bytearray(spec.size_bytes)
                OpenRelayed(reader, number, spec.size_bytes).read_into(memoryview(data), 0)
                segments.append(data)
        return shards_of(self._layout, segments)

    async def describe(
        self, layout_digest: str, layout: bytes, deadline_s: float
    ) -> tuple[Described, ...]:
        self._never()

    async def attach(
        self,
        layout_digest: str,
        needs_digests: Sequence[str],
        cells: Sequence[Sequence[Cell]],
        deadline_s: float,
    ) -> tuple[Attached, ...]:
        self._never()

    async def pause(self, deadline_s: float) -> None:
        self._never()

    async def inspect(self, layout_digest: str | None, deadline_s: float) -> tuple[Inspected, ...]:
        self._never()

    async def resume(self, version: int, deadline_s: float) -> None:
        self._never()

    async def state(self, deadline_s: float) -> EngineReport:
        self._never()

    def _never(self) -> NoReturn:
        raise AssertionError("a route only applies")


class Gate:
    """Holds threads until it is opened; for no longer than a test may take."""

    def __init__(self) -> None:
        self.reached, self._open = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self.reached.set()
        assert self._open.wait(DEADLINE_S), "the gate was never opened"

    def open(self) -> None:
        self._open.set()
