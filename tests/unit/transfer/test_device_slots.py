"""Memory of device lanes: what is kept, what is opened again, and what is never freed too soon."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.fake_cuda import FakeCuda
from tests.unit.transfer.staging import Owner, open_staging
from weightbus.bus.errors import CudaFailed
from weightbus.consumers.errors import SegmentUnavailable
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.transfer.device_slots import KEPT_OPENINGS, DeviceSlots, LaneSlots
from weightbus.consumers.transfer.lanes import StagingBlock, StagingCache
from weightbus.schemas.shared_memory import (
    SHM_GIVEN_UP_OFFSET,
    SHM_HANDLE_SET_OFFSET,
    SHM_READERS_OFFSET,
    TURN_BITS,
)

SIZE_BYTES = 6000
TURN = 5
LEFT = (1 << TURN_BITS) - 1


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def slots(cuda: FakeCuda) -> Iterator[DeviceSlots]:
    slots = DeviceSlots(0, lambda: cuda)
    yield slots
    slots.close()


@contextmanager
def opened(count: int = 1) -> Iterator[tuple[Owner, tuple[StagingBlock, ...]]]:
    cache = StagingCache()
    with (
        open_staging(count, 0) as owner,
        cache.open_all(owner.names, 0, TURN, Deadline("test", 30.0)) as blocks,
    ):
        yield owner, blocks
    cache.close()


def take(slots: DeviceSlots, block: StagingBlock) -> LaneSlots:
    slots.begin()
    found = slots.take(block.name, SIZE_BYTES)
    found.name_in(block)
    return found


def idle(slots: DeviceSlots, openings: int = KEPT_OPENINGS) -> None:
    for _ in range(openings):
        slots.begin()
        slots.end()


def done(owner: Owner, buckets: int, *, readers: int = 2, turn: int = TURN) -> None:
    for reader in range(readers):
        owner.blocks[0].set_word(SHM_READERS_OFFSET + 8 * reader, turn << TURN_BITS | buckets)


def test_slots_are_kept_by_block_and_freed_when_they_are_unused(
    cuda: FakeCuda, slots: DeviceSlots
) -> None:
    with opened() as (owner, (block,)):
        found = take(slots, block)
        assert found.address % 4096 == 0
        assert cuda.allocated[found.address] == 2 * 2**20, "whole pages of what is exported"
        for _ in range(3):
            assert take(slots, block) is found
        assert block.word(SHM_HANDLE_SET_OFFSET) == 1, "written once"
        idle(slots, KEPT_OPENINGS - 1)
        assert cuda.allocated
        idle(slots, 1)
        assert not cuda.allocated
        assert take(slots, block) is not found
        assert owner.blocks[0].word(SHM_HANDLE_SET_OFFSET) == 2
    slots.close()
    cuda.assert_clean()


@pytest.mark.parametrize(
    ("buckets", "given_up", "freed"),
    [(9, False, False), (10, False, True), (LEFT, False, True), (9, True, False)],
)
def test_slots_are_freed_only_when_nobody_reads_them(
    cuda: FakeCuda, slots: DeviceSlots, buckets: int, given_up: bool, freed: bool
) -> None:
    with opened() as (owner, (block,)):
        found = take(slots, block)
        found.begin(block, TURN, 2, 10)
        done(owner, buckets)
        if given_up:
            owner.give_up(TURN)
        idle(slots)
        assert (not cuda.allocated) == freed
        done(owner, LEFT)
        idle(slots, 1)
        assert not cuda.allocated


def test_slots_are_free_when_a_turn_is_given_up_before_a_reader_has_begun(
    cuda: FakeCuda, slots: DeviceSlots
) -> None:
    with opened() as (owner, (block,)):
        take(slots, block).begin(block, TURN, 2, 10)
        done(owner, 10, readers=1)
        idle(slots)
        assert cuda.allocated
        owner.give_up(TURN)
        idle(slots, 1)
        assert not cuda.allocated


def test_reader_that_is_late_is_told_when_its_slots_go_to_another_lane(
    cuda: FakeCuda, slots: DeviceSlots
) -> None:
    with opened(2) as (owner, (first, second)):
        found = take(slots, first)
        found.begin(first, TURN, 2, 10)
        done(owner, 3)
        again = take(slots, second)
        assert again is found
        again.begin(second, TURN + 1, 2, 10)
        assert owner.blocks[0].word(SHM_GIVEN_UP_OFFSET) == TURN
        assert owner.blocks[1].word(SHM_GIVEN_UP_OFFSET) == 0
        assert second.word(SHM_HANDLE_SET_OFFSET) == 1
        assert cuda.calls["allocate"] == 1
        owner.give_up(TURN + 1)


def test_turn_that_follows_in_the_same_block_gives_nothing_up(slots: DeviceSlots) -> None:
    with opened() as (owner, (block,)):
        for turn in (TURN, TURN + 1):
            take(slots, block).begin(block, turn, 2, 10)
        assert owner.blocks[0].word(SHM_GIVEN_UP_OFFSET) == 0
        owner.give_up(TURN + 1)


def test_slots_are_freed_for_others_when_the_device_is_full(slots: DeviceSlots) -> None:
    with opened(2) as (_, (first, second)):
        cuda = FakeCuda(device_bytes=3 * 2**20)
        small = DeviceSlots(0, lambda: cuda)
        take(small, first)
        small.begin()
        assert small.take(second.name, 2 * SIZE_BYTES).size_bytes == 2 * SIZE_BYTES
        assert len(cuda.allocated) == 1
        with pytest.raises(CudaFailed, match="out of memory"):
            small.take(first.name, SIZE_BYTES)
        small.close()
        cuda.assert_clean()


def test_slots_that_are_read_stay_when_the_worker_closes(
    cuda: FakeCuda, slots: DeviceSlots
) -> None:
    with opened() as (owner, (block,)):
        take(slots, block).begin(block, TURN, 1, 10)
        done(owner, 9)
        slots.close()
        assert len(cuda.allocated) == 1


def test_handle_of_a_peer_is_opened_once_until_it_is_written_anew(cuda: FakeCuda) -> None:
    peer_cuda = cuda.other_process()
    mine, peer = DeviceSlots(0, lambda: cuda), DeviceSlots(0, lambda: peer_cuda)
    with opened() as (_, (block,)):
        found = take(peer, block)
        for _ in range(3):
            mine.begin()
            assert mine.open_peer(block, SIZE_BYTES) == found.address
            mine.end()
        assert cuda.calls["open_handle"] == 1
        block.set_word(SHM_HANDLE_SET_OFFSET, block.word(SHM_HANDLE_SET_OFFSET) + 1)
        assert not mine.is_current(block)
        mine.begin()
        assert mine.open_peer(block, SIZE_BYTES) == found.address
        assert (cuda.calls["open_handle"], cuda.calls["close_handle"]) == (2, 1)
        assert mine.is_current(block)
        idle(mine)
        assert not +cuda.opened
    peer.close()
    cuda.assert_clean()


def test_peer_is_named_when_its_slots_are_smaller_than_they_must_be(cuda: FakeCuda) -> None:
    peer_cuda = cuda.other_process()
    mine, peer = DeviceSlots(0, lambda: cuda), DeviceSlots(0, lambda: peer_cuda)
    with opened() as (_, (block,)):
        take(peer, block)
        mine.begin()
        with pytest.raises(SegmentUnavailable, match=rf"{block.name} is a lane of 2,097,152 bytes"):
            mine.open_peer(block, 2**21 + 1)
    peer.close()
    cuda.assert_clean()
