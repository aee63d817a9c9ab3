"""Staging blocks: which are mapped, what their words say, and when waiting ends early."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_cuda import FakeCuda
from tests.unit.transfer.blocks import open_block
from tests.unit.transfer.staging import Owner, open_staging
from weightbus.consumers.errors import DeadlineExceeded, SegmentUnavailable
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.transfer.lanes import Lanes, StagingCache
from weightbus.consumers.transfer.segments import KEPT_OPENINGS
from weightbus.schemas.shared_memory import (
    SHM_FILLED_OFFSET,
    SHM_HEADER_BYTES,
    SHM_READERS_OFFSET,
    TURN_BITS,
)
from weightbus.schemas.worker import Stream

LONG_S = 30.0
TURN = 7


@pytest.fixture
def cache() -> Iterator[StagingCache]:
    cache = StagingCache()
    yield cache
    cache.close()


@pytest.fixture
def owner() -> Iterator[Owner]:
    with open_staging(2, 4096) as owner:
        yield owner


def long() -> Deadline:
    return Deadline("test", LONG_S)


def feed_of(owner: Owner, reader: int = 0) -> Stream:
    return Stream(lanes=owner.names, bucket_bytes=2048, slots=2, turn=TURN, reader=reader)


def fill(owner: Owner, *buckets: int, turn: int = TURN) -> None:
    for block, count in zip(owner.blocks, buckets, strict=True):
        block.set_word(SHM_FILLED_OFFSET, turn << TURN_BITS | count)


def done(owner: Owner, reader: int = 0) -> list[tuple[int, int]]:
    """(turn, buckets) of the reader's word in every block."""
    words = [block.word(SHM_READERS_OFFSET + 8 * reader) for block in owner.blocks]
    return [divmod(word, 1 << TURN_BITS) for word in words]


def mapped(name: str) -> bool:
    """Whether a mapping exists beside the owner's own."""
    return Path("/proc/self/maps").read_text().count(name) > 1


def test_reader_counts_in_its_own_word_when_buckets_are_done(
    owner: Owner, cache: StagingCache
) -> None:
    with cache.open_all(owner.names, 4096, TURN, long()) as blocks:
        lanes = Lanes(blocks, feed_of(owner, reader=3), long())
        assert done(owner, 3) == [(TURN, 0)] * 2
        fill(owner, 2, 1)
        lanes.wait_filled(0)
        owner.blocks[1].put(0, b"abc")
        assert bytes(blocks[1].data[:3]) == b"abc"
        assert lanes.address(1, 0) - lanes.address(0, 0) == 2048
        assert lanes.address(2, 1) == lanes.address(0, 1) == blocks[1].address
        lanes.done(0)
        assert done(owner, 3) == [(TURN, 1)] * 2
        assert done(owner, 0) == [(0, 0)] * 2


def test_wait_lasts_until_every_lane_is_filled_in_this_turn(
    owner: Owner, cache: StagingCache
) -> None:
    with cache.open_all(owner.names, 4096, TURN, long()) as blocks:
        for buckets, turn in (((5, 5), TURN - 1), ((1, 0), TURN), ((5, 5), TURN + 1)):
            fill(owner, *buckets, turn=turn)
            lanes = Lanes(blocks, feed_of(owner), Deadline("test", 0.01))
            with pytest.raises(DeadlineExceeded, match="test did not end within"):
                lanes.wait_filled(0)
        lanes = Lanes(blocks, feed_of(owner), long())
        later = threading.Timer(0.05, fill, (owner, 1, 1))
        later.start()
        lanes.wait_filled(0)
        later.join()


def test_blocks_are_registered_once_whole_when_the_worker_is_on_a_gpu(owner: Owner) -> None:
    cuda = FakeCuda(devices=2)
    cache = StagingCache("cuda:1", lambda: cuda)
    whole = (SHM_HEADER_BYTES + 4096, False)
    for _ in range(3):
        with cache.open_all(owner.names, 4096, TURN, long()) as blocks:
            registered = {block.address - SHM_HEADER_BYTES: whole for block in blocks}
            assert cuda.registered == registered
    for _ in range(KEPT_OPENINGS):
        with cache.open_all(owner.names[:1], 4096, TURN, long()) as blocks:
            pass
    assert list(cuda.registered) == [blocks[0].address - SHM_HEADER_BYTES]
    assert cuda.calls["register"] == 2
    assert cuda.contexts == {1}
    cache.close()
    cuda.assert_clean()
    assert not any(map(mapped, owner.names))


def test_block_is_named_and_unmapped_when_the_gpu_does_not_take_it(owner: Owner) -> None:
    cuda = FakeCuda()
    cuda.fail("register", after=1)
    cache = StagingCache("cuda:0", lambda: cuda)
    before = len(os.listdir("/proc/self/fd"))
    reason = f"{owner.names[1]} is 8,192 bytes that device 0 does not take"
    with (
        pytest.raises(SegmentUnavailable, match=reason),
        cache.open_all(owner.names, 4096, TURN, long()),
    ):
        pytest.fail("opened")
    assert list(map(mapped, owner.names)) == [True, False]
    cache.close()
    assert len(os.listdir("/proc/self/fd")) == before
    cuda.assert_clean()


def test_block_stays_mapped_when_the_gpu_does_not_let_go_of_it(owner: Owner) -> None:
    cuda = FakeCuda()
    cache = StagingCache("cuda:0", lambda: cuda)
    before = len(os.listdir("/proc/self/fd"))
    with cache.open_all(owner.names, 4096, TURN, long()):
        pass
    cuda.fail("unregister", "CUDA_ERROR_ILLEGAL_ADDRESS")
    cache.close()
    assert list(map(mapped, owner.names)) == [True, False]
    assert len(os.listdir("/proc/self/fd")) == before + 1, "the mapping's own"
    ((address, _),) = cuda.registered.items()
    cuda.unregister(address)
    cuda.assert_clean()


def test_bucket_is_not_done_when_the_owner_took_up_another_turn(
    owner: Owner, cache: StagingCache
) -> None:
    with cache.open_all(owner.names, 4096, TURN, long()) as blocks:
        lanes = Lanes(blocks, feed_of(owner), long())
        fill(owner, 1, 1)
        lanes.wait_filled(0)
        fill(owner, 1, 1, turn=TURN + 1)
        with pytest.raises(SegmentUnavailable, match="on turn 8: must stay on turn 7"):
            lanes.done(0)
        assert done(owner) == [(TURN, 0)] * 2


def test_wait_ends_at_once_when_one_owner_gives_up(owner: Owner, cache: StagingCache) -> None:
    with cache.open_all(owner.names, 4096, TURN, long()) as blocks:
        lanes = Lanes(blocks, feed_of(owner), long())
        Owner(owner.blocks[1:]).give_up(TURN - 1)
        fill(owner, 1, 1)
        lanes.wait_filled(0)
        Owner(owner.blocks[1:]).give_up(TURN)
        with pytest.raises(SegmentUnavailable, match="given up by its owner"):
            lanes.wait_filled(1)
    with (
        pytest.raises(SegmentUnavailable, match="given up by its owner"),
        cache.open_all([owner.names[1], "weightbus-none"], 4096, TURN, long()),
    ):
        pass


def test_wait_ends_when_the_process_that_owns_a_lane_is_killed(cache: StagingCache) -> None:
    name = f"weightbus-stage.test.{uuid.uuid4().hex}"
    program = (
        "import sys; from weightbus.bus.blocks import SharedBlock;"
        f"block = SharedBlock({name!r}, 4096); print('made', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            with cache.open_all([name], 4096, TURN, long()) as blocks:
                feed = Stream(lanes=(name,), bucket_bytes=2048, slots=2, turn=TURN, reader=0)
                lanes = Lanes(blocks, feed, long())
                assert not blocks[0].is_orphan()
                killer = threading.Timer(0.05, process.kill)
                killer.start()
                with pytest.raises(SegmentUnavailable, match="without its owner"):
                    lanes.wait_filled(0)
                killer.join()
        finally:
            process.kill()
            Path("/dev/shm", name).unlink(missing_ok=True)
    with pytest.raises(DeadlineExceeded), cache.open_all([name], 4096, TURN, Deadline("gone", 0.1)):
        pass


def test_looking_at_the_owner_leaves_no_lock(owner: Owner, cache: StagingCache) -> None:
    with cache.open_all(owner.names, 4096, TURN, long()) as blocks:
        owner.vanish()
        assert blocks[0].is_orphan()
        fcntl.flock(owner.blocks[0].fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not blocks[0].is_orphan()


def test_block_is_waited_for_when_it_is_made_later(cache: StagingCache) -> None:
    name = f"weightbus-stage.test.{uuid.uuid4().hex}"
    path = Path("/dev/shm", name)
    made = threading.Event()
    gone = threading.Event()

    def make() -> None:
        path.write_bytes(b"")  # begun, and without a header yet
        path.unlink()
        with open_block(bytes(4096), "", name):
            made.set()
            gone.wait(LONG_S)

    maker = threading.Timer(0.05, make)
    maker.start()
    try:
        with cache.open_all([name], 4096, TURN, long()) as (block,):
            assert made.wait(LONG_S)
            assert block.name == name
    finally:
        gone.set()
        maker.join()


def test_block_is_not_ready_while_its_header_is_missing(cache: StagingCache) -> None:
    path = Path("/dev/shm", f"weightbus-stage.test.{uuid.uuid4().hex}")
    try:
        for size_bytes in (0, SHM_HEADER_BYTES + 4096):
            path.write_bytes(bytes(size_bytes))
            with (
                pytest.raises(DeadlineExceeded),
                cache.open_all([path.name], 4096, TURN, Deadline("making", 0.02)),
            ):
                pass
        path.write_bytes(b"something" * 1000)
        with (
            pytest.raises(SegmentUnavailable, match="not a block of ours"),
            cache.open_all([path.name], 4096, TURN, long()),
        ):
            pass
    finally:
        path.unlink()


def test_block_is_refused_when_it_is_small_or_no_file(owner: Owner, cache: StagingCache) -> None:
    with (
        pytest.raises(SegmentUnavailable, match="4096 bytes long: must hold at least 4097"),
        cache.open_all(owner.names, 4097, TURN, long()),
    ):
        pass
    link = Path("/dev/shm", f"weightbus-stage.test.{uuid.uuid4().hex}")
    link.symlink_to(owner.blocks[0].path)
    try:
        with pytest.raises(SegmentUnavailable), cache.open_all([link.name], 1, TURN, long()):
            pass
    finally:
        link.unlink()
    with (
        pytest.raises(SegmentUnavailable, match="must lie below"),
        cache.open_all(["/etc/passwd"], 1, TURN, long()),
    ):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_block_is_refused_when_it_is_of_another_user(owner: Owner, cache: StagingCache) -> None:
    os.seteuid(12345)
    try:
        other = f"weightbus-stage.test.{uuid.uuid4().hex}"
        with open_block(bytes(64), "", other):
            os.seteuid(0)
            with (
                pytest.raises(SegmentUnavailable, match="owned by user 12345"),
                cache.open_all([other], 64, TURN, long()),
            ):
                pass
            os.seteuid(12345)
    finally:
        os.seteuid(0)


def test_block_without_its_owner_is_refused_after_a_while(
    owner: Owner, cache: StagingCache
) -> None:
    owner.vanish()
    with (
        pytest.raises(SegmentUnavailable, match="without its owner"),
        cache.open_all(owner.names, 4096, TURN, long()),
    ):
        pass


def test_mapping_is_kept_while_used_and_replaced_when_the_block_is_made_anew(
    cache: StagingCache,
) -> None:
    with open_staging(2, 4096) as first:
        first_name, second_name = first.names
        with cache.open_all(first.names, 4096, TURN, long()) as blocks:
            addresses = [block.address for block in blocks]
        with cache.open_all(first.names, 4096, TURN, long()) as blocks:
            assert [block.address for block in blocks] == addresses
        first.blocks[0].unlink()
        with open_block(b"new" + bytes(4093), "", first_name):
            with cache.open_all([first_name], 4096, TURN, long()) as (block,):
                assert bytes(block.data[:3]) == b"new"
            assert mapped(second_name)
            for _ in range(KEPT_OPENINGS):
                with cache.open_all([first_name], 4096, TURN, long()):
                    pass
            assert not mapped(second_name)
            assert mapped(first_name)
            cache.close()
