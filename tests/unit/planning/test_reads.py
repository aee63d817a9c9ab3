"""Spreading reads over sources: every byte once, bounded batches, even shares."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.reads import (
    BATCH_BYTES,
    GAP_BYTES,
    MAX_ENTRIES,
    MIN_SHARE_BYTES,
    Reads,
    as_reads,
    plan_reads,
)

MIB = 2**20


@st.composite
def wanted(draw: st.DrawFn) -> Reads:
    """Reads in random order, some of which follow each other closely at both ends."""
    rows, address, source = [], draw(st.integers(0, 5000)), 0
    for _ in range(draw(st.integers(0, 40))):
        gap = draw(st.sampled_from([0, 0, 1, 7, GAP_BYTES, GAP_BYTES + 1]))
        address += gap
        source = source + gap if draw(st.booleans()) else draw(st.integers(0, 10**6))
        size = draw(st.sampled_from([0, 1, 255, 4096, MIB, 5 * MIB, 33 * MIB]))
        rows.append((draw(st.integers(0, 2)), source, address, size))
        address, source = address + size, source + size
    return as_reads(draw(st.permutations(rows)))


@given(wanted(), st.integers(1, 9), st.integers(0, 20))
def test_every_byte_is_read_once_from_where_it_lies(reads: Reads, sources: int, turn: int) -> None:
    batches = plan_reads(reads, sources, turn)

    planned = sorted(
        (int(read["address"]), int(read["size_bytes"]), int(read["segment"]), int(read["source"]))
        for batch in batches
        for read in batch.reads
    )
    ends = [address + size for address, size, _, _ in planned]
    assert all(end <= begin for end, (begin, *_) in zip(ends, planned[1:], strict=False))
    for read in reads[reads["size_bytes"] > 0]:
        at, end = int(read["address"]), int(read["address"] + read["size_bytes"])
        for address, size, segment, source in planned:
            if at < end and address <= at < address + size:
                assert (segment, source - address) == (
                    read["segment"],
                    read["source"] - read["address"],
                )
                at = min(end, address + size)
        assert at == end, f"{end - at} bytes of {read} are not read"


@given(wanted(), st.integers(1, 9), st.integers(0, 20))
def test_batches_are_bounded_and_shares_even(reads: Reads, sources: int, turn: int) -> None:
    batches = plan_reads(reads, sources, turn)

    assert all(1 <= len(batch.reads) <= MAX_ENTRIES for batch in batches)
    assert all(0 < batch.size_bytes <= BATCH_BYTES for batch in batches)
    of_source: Counter[int] = Counter()
    for batch in batches:
        of_source[batch.source] += batch.size_bytes
    total = sum(of_source.values())
    assert len(of_source) <= max(1, min(sources, total // MIN_SHARE_BYTES))
    if of_source:
        assert max(of_source.values()) - min(of_source.values()) < BATCH_BYTES
    wanted_bytes = int(reads["size_bytes"].sum())
    assert total <= wanted_bytes + GAP_BYTES * len(reads)


def test_nothing_between_reads_is_read_when_the_gaps_differ() -> None:
    reads = as_reads([(0, 0, 0, 100), (0, 200, 201, 100), (1, 301, 302, 8)])

    (batch,) = plan_reads(reads, 1)

    assert batch.reads.tolist() == reads.tolist()


def test_bytes_between_reads_are_read_along_up_to_the_threshold() -> None:
    near = as_reads([(0, 0, 0, 8), (0, 8 + GAP_BYTES, 8 + GAP_BYTES, 8)])
    far = as_reads([(0, 0, 0, 8), (0, 9 + GAP_BYTES, 9 + GAP_BYTES, 8)])

    assert [len(batch.reads) for batch in plan_reads(near, 1)] == [1]
    assert [len(batch.reads) for batch in plan_reads(far, 1)] == [2]


def test_receivers_ask_different_sources_for_the_same_bytes() -> None:
    reads = as_reads([(0, 0, 0, 40 * MIB)])

    first = [plan_reads(reads, 4, receiver)[0].source for receiver in range(4)]

    assert sorted(first) == [0, 1, 2, 3]


def test_small_reads_take_turns_with_the_sources() -> None:
    reads = as_reads([(0, 0, 0, 4096)])

    used = Counter(batch.source for turn in range(12) for batch in plan_reads(reads, 4, turn))

    assert used == dict.fromkeys(range(4), 3)


def test_many_scattered_reads_are_planned_in_no_time() -> None:
    count = 140_000
    rows = np.arange(count)
    reads = as_reads([])
    reads = np.zeros(count, dtype=reads.dtype)
    reads["source"], reads["address"], reads["size_bytes"] = rows * 8192, rows * 4096, 1000

    batches = plan_reads(reads, 8)

    assert sum(len(batch.reads) for batch in batches) >= count
    assert sum(batch.size_bytes for batch in batches) == 1000 * count


def test_planning_fails_when_there_is_no_source() -> None:
    with pytest.raises(PlanError, match="number of sources is 0"):
        plan_reads(as_reads([(0, 0, 0, 1)]), 0)


def test_planning_fails_when_two_reads_go_to_one_byte() -> None:
    with pytest.raises(PlanError, match="must not be another's"):
        plan_reads(as_reads([(0, 0, 0, 10), (0, 50, 9, 10)]), 1)
