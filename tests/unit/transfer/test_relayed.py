"""Relayed segments: windows are asked for once while they are kept, and reads are exact."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.unit.transfer.staging import Owner, open_staging, relaying
from weightbus.consumers.errors import DeadlineExceeded, SegmentUnavailable
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.transfer.lanes import StagingBlock, StagingCache
from weightbus.consumers.transfer.relayed import OpenRelayed, RelayReader
from weightbus.schemas.worker import Relay

LONG_S = 30.0
WINDOW_BYTES = 100
SLOTS = 3
SEGMENTS = [random.Random(0).randbytes(1050), b"", random.Random(1).randbytes(100)]


@pytest.fixture
def owner() -> Iterator[Owner]:
    with open_staging(1, SLOTS * WINDOW_BYTES) as owner:
        yield owner


@pytest.fixture
def block(owner: Owner) -> Iterator[StagingBlock]:
    cache = StagingCache()
    with cache.open_all(owner.names, SLOTS * WINDOW_BYTES, 5, Deadline("test", LONG_S)) as blocks:
        yield blocks[0]
    cache.close()


def feed_of(owner: Owner) -> Relay:
    return Relay(block=owner.names[0], window_bytes=WINDOW_BYTES, slots=SLOTS, turn=5)


def open_segments(
    block: StagingBlock, feed: Relay, deadline_s: float = LONG_S
) -> list[OpenRelayed]:
    reader = RelayReader(block, feed, Deadline("test", deadline_s))
    return [OpenRelayed(reader, number, len(data)) for number, data in enumerate(SEGMENTS)]


def read(segment: OpenRelayed, start: int, end: int) -> bytes:
    buffer = bytearray(end - start)
    segment.read_into(memoryview(buffer), start)
    return bytes(buffer)


def test_reads_are_exact_wherever_they_begin_and_end(owner: Owner, block: StagingBlock) -> None:
    source = random.Random(2)
    with relaying(owner, SEGMENTS, feed_of(owner)):
        segments = open_segments(block, feed_of(owner))
        for _ in range(200):
            number = source.randrange(len(SEGMENTS))
            start = source.randrange(len(SEGMENTS[number]) + 1)
            end = source.randrange(start, len(SEGMENTS[number]) + 1)
            assert read(segments[number], start, end) == SEGMENTS[number][start:end]
        for segment in segments:
            segment.check()


def test_longest_unused_window_goes_when_slots_are_taken(owner: Owner, block: StagingBlock) -> None:
    with relaying(owner, SEGMENTS, feed_of(owner)) as asked:
        first, _, last = open_segments(block, feed_of(owner))
        for segment, start in ((first, 0), (first, 150), (last, 0), (first, 99), (first, 1049)):
            read(segment, start, start + 1)
        assert asked == [(0, 0, 0), (0, 1, 1), (2, 0, 2), (0, 10, 1)]
        read(first, 0, 300)
        assert asked[4:] == [(0, 1, 2), (0, 2, 1)]


def test_read_is_refused_when_it_ends_outside(owner: Owner, block: StagingBlock) -> None:
    segments = open_segments(block, feed_of(owner))
    with pytest.raises(SegmentUnavailable, match="100 bytes long: must hold at least 101"):
        read(segments[2], 99, 101)


def test_read_fails_when_the_consumer_gives_up_is_gone_or_late(
    owner: Owner, block: StagingBlock
) -> None:
    feed = feed_of(owner)
    with pytest.raises(DeadlineExceeded):
        read(open_segments(block, feed, 0.01)[0], 0, 1)
    owner.vanish()
    with pytest.raises(SegmentUnavailable, match="without its owner"):
        read(open_segments(block, feed)[0], 0, 1)
    owner.give_up(5)
    with pytest.raises(SegmentUnavailable, match="given up by its owner"):
        read(open_segments(block, feed)[0], 0, 1)
    with pytest.raises(SegmentUnavailable, match="given up by its owner"):
        open_segments(block, feed)[0].check()
