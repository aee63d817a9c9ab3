"""Staging blocks as their owner has them: words, reuse, condemnation, and a bound on all memory."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightbus.bus.errors import SharedMemoryFull
from weightbus.consumers.transfer.staging import BlockPool, BlockSpec, Request
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES

KIB = 1024
DEADLINE_S = 10.0


@pytest.fixture
def pool() -> Iterator[BlockPool]:
    pool = BlockPool(f"test-{uuid.uuid4().hex[:8]}.e", 64 * KIB)
    yield pool
    pool.close()


def on_disk(pool: BlockPool) -> int:
    prefix = pool.name_of("")
    return sum(os.stat(p).st_size for p in Path("/dev/shm").glob(f"{prefix}*"))


def spec(pool: BlockPool, part: str, slots: int = 2, slot_bytes: int = 4 * KIB) -> BlockSpec:
    return BlockSpec(pool.name_of(part), slots, slot_bytes)


def test_words_count_for_their_turn_only(pool: BlockPool) -> None:
    (block,) = pool.take([spec(pool, "a")])
    with open(Path("/dev/shm") / block.name, "r+b", buffering=0) as file:

        def word(offset: int) -> int:
            return int.from_bytes(os.pread(file.fileno(), 8, offset), "little")

        def say(offset: int, *values: int) -> None:
            raw = b"".join(value.to_bytes(8, "little") for value in values)
            os.pwrite(file.fileno(), raw, offset)

        block.begin(7)
        assert word(64) == 7 << 32
        block.filled(3)
        assert word(64) == 7 << 32 | 3
        assert block.done(1) == -1
        say(256 + 8, 7 << 32 | 2)
        assert block.done(1) == 2
        assert block.request(0) is None
        say(88, 5, 6, 1)
        say(80, 7 << 32 | 1)
        assert block.request(0) == Request(1, 5, 6, 1)
        assert block.request(1) is None
        block.give_up()
        assert word(72) == 7
        block.begin(8)
        assert (block.done(1), block.request(0), word(72)) == (-1, None, 0)


def test_block_is_taken_again_when_it_was_given_back_whole(pool: BlockPool) -> None:
    first = pool.take([spec(pool, "a")])
    pool.give_back(first)
    assert pool.take([spec(pool, "a")])[0] is first[0]
    pool.give_back(first)
    other = pool.take([spec(pool, "a", slots=1)])
    assert other[0] is not first[0]
    assert pool.total_bytes == on_disk(pool) == 4 * KIB + SHM_HEADER_BYTES


def test_condemned_block_is_another_one_and_its_memory_stays_while_it_is_written(
    pool: BlockPool,
) -> None:
    (block,) = pool.take([spec(pool, "a")])
    block.begin(1)
    writing = True
    pool.condemn([block], lambda: writing)
    assert not (Path("/dev/shm") / block.name).exists()
    (again,) = pool.take([spec(pool, "a")])
    assert again is not block
    assert pool.total_bytes == 2 * (8 * KIB + SHM_HEADER_BYTES), "the grave counts"
    block.slot(0)[:3] = b"abc"
    writing = False
    pool.give_back([again])
    assert pool.total_bytes == 8 * KIB + SHM_HEADER_BYTES


def test_pool_never_exceeds_its_bound_when_blocks_of_all_sizes_are_taken(pool: BlockPool) -> None:
    for number in range(12):
        blocks = pool.take([spec(pool, f"{number}.{part}", slots=3) for part in range(2)])
        assert on_disk(pool) <= 64 * KIB
        assert pool.total_bytes <= 64 * KIB
        pool.give_back(blocks)


def test_take_is_refused_and_nothing_is_taken_when_room_is_short(pool: BlockPool) -> None:
    with pytest.raises(SharedMemoryFull) as full:
        pool.take([spec(pool, "a"), spec(pool, "b", slot_bytes=64 * KIB)])
    assert full.value.need_bytes == 2 * 64 * KIB + SHM_HEADER_BYTES
    assert pool.room_bytes == 64 * KIB
    (block,) = pool.take([spec(pool, "a")])
    pool.give_back([block])


def test_blocks_are_closed_when_versions_did_not_use_them(pool: BlockPool) -> None:
    pool.give_back(pool.take([spec(pool, "a")]))
    for _ in range(3):
        pool.give_back(pool.take([spec(pool, "b")]))
    assert on_disk(pool) == 8 * KIB + SHM_HEADER_BYTES


def test_nothing_is_left_when_pool_is_closed() -> None:
    pool = BlockPool(f"test-{uuid.uuid4().hex[:8]}.e", 64 * KIB)
    pool.take([spec(pool, "a"), spec(pool, "b")])
    pool.close()
    assert on_disk(pool) == 0
    assert pool.total_bytes == 0


def test_spec_counts_the_header() -> None:
    assert BlockSpec("x", 3, 4 * KIB).size_bytes == 12 * KIB + SHM_HEADER_BYTES


def test_room_is_told_at_once_while_blocks_are_made(pool: BlockPool) -> None:
    assert pool.room_bytes == 64 * KIB
    told: list[int] = []
    with pool._lock:  # as a thread has it that allocates
        thread = threading.Thread(target=lambda: told.append(pool.room_bytes), daemon=True)
        thread.start()
        thread.join(DEADLINE_S)
    assert told == [64 * KIB]


def test_memory_of_a_transfer_that_has_not_ended_stays_when_pool_is_closed() -> None:
    pool = BlockPool(f"test-{uuid.uuid4().hex[:8]}.e", 64 * KIB)
    (block,) = pool.take([spec(pool, "a")])
    memory = weakref.ref(block)
    address = block.address
    pool.close()
    pool.condemn([block], lambda: True)  # its transfer ends now
    pool.give_back([block])
    del block
    gc.collect()
    assert memory() is not None
    ctypes.memset(address, 1, 8 * KIB)  # what a call writes that was left
