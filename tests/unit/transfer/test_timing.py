"""Timings of buckets cover their stage, and are told only where they tell something."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from weightbus.consumers.transfer.timing import BUCKETS_KEPT, Timing
from weightbus.schemas.worker import StageTiming


def timing_of(buckets: int) -> Timing:
    timing = Timing()
    for bucket in range(buckets):
        timing.add(time.time_ns(), 100 + bucket)
    return timing


def test_stage_is_not_told_when_nothing_was_brought() -> None:
    timing = Timing()
    timing.begin()
    assert timing.told("fetch") == ()


def test_buckets_cover_the_stage_and_add_up() -> None:
    (told,) = timing_of(5).told("fetch")
    assert (told.stage, told.bytes) == ("fetch", 510)
    assert [bucket.bytes for bucket in told.buckets] == [100, 101, 102, 103, 104]
    assert told.buckets[0].start_ns == told.start_ns
    assert told.buckets[-1].end_ns == told.end_ns
    times = [time_ns for bucket in told.buckets for time_ns in (bucket.start_ns, bucket.end_ns)]
    assert times == sorted(times), "one after the other"


def test_buckets_follow_without_a_gap_when_only_their_ends_are_seen() -> None:
    timing = Timing()
    timing.begin()
    begun_ns = timing.start_ns
    for size_bytes in (3, 4, 5):
        timing.begin()
        timing.follow(size_bytes)
    (told,) = timing.told("broadcast")
    assert (told.start_ns, told.bytes) == (begun_ns, 12)
    starts = [bucket.start_ns for bucket in told.buckets]
    assert starts == [begun_ns, *(bucket.end_ns for bucket in told.buckets[:-1])]
    assert told.buckets[-1].end_ns == told.end_ns


@pytest.mark.parametrize(
    ("count", "kept"), [(1, 0), (2, 2), (BUCKETS_KEPT, BUCKETS_KEPT), (BUCKETS_KEPT + 1, 0)]
)
def test_buckets_are_told_when_there_are_several_and_not_too_many(count: int, kept: int) -> None:
    (told,) = timing_of(count).told("fetch")
    assert len(told.buckets) == kept
    assert told == StageTiming(
        "fetch", told.start_ns, told.end_ns, sum(range(100, 100 + count)), told.buckets
    )


def test_nothing_more_is_allocated_when_buckets_are_added() -> None:
    timing = timing_of(2)
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot()
        for _ in range(1000):
            timing.follow(1000)
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    grown = sum(
        max(0, stat.size_diff)
        for stat in after.compare_to(before, "filename")
        if "timing.py" in stat.traceback[0].filename
    )
    assert grown < 1000, f"{grown} bytes for 1000 buckets"
