"""Segments: what may be opened, what may not, and what is noticed after reading."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.transfer.blocks import Block, open_block
from weightbus.consumers.errors import SegmentUnavailable, TornRead
from weightbus.consumers.transfer.opening import stamped
from weightbus.consumers.transfer.segments import (
    OpenFile,
    OpenMemory,
    SegmentCache,
    probe_segment,
)
from weightbus.schemas.placement import FileSegment, RemoteSegment, SharedMemorySegment

HOST = "this-host"


@pytest.fixture
def block() -> Iterator[Block]:
    with open_block(bytes(range(200)), HOST) as block:
        yield block


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[SegmentCache]:
    cache = SegmentCache(HOST, [str(tmp_path)])
    yield cache
    cache.close()


def write(path: Path, data: bytes) -> FileSegment:
    path.write_bytes(data)
    return FileSegment(path=str(path))


def mapped_for_reading(block: Block) -> bool:
    """Whether a read-only mapping exists beside the writer's own."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(block.name in line and " r--s " in line for line in lines)


def test_block_is_read_in_place_when_mapped(block: Block, cache: SegmentCache) -> None:
    with cache.open_all([block.segment()], [200]) as (opened,):
        assert isinstance(opened, OpenMemory)
        assert ctypes.string_at(opened.address, 200) == bytes(range(200))
        copy = bytearray(3)
        opened.read_into(memoryview(copy), 197)
        assert copy == bytes([197, 198, 199])
        opened.check()
        with pytest.raises(SegmentUnavailable, match="200 bytes long: must hold at least 201"):
            opened.read_into(memoryview(copy), 198)


def test_file_is_read_into_private_memory_when_opened(tmp_path: Path, cache: SegmentCache) -> None:
    segment = write(tmp_path / "a", b"0123456789")
    with cache.open_all([segment], [10]) as (opened,):
        assert isinstance(opened, OpenFile)
        copy = bytearray(4)
        opened.read_into(memoryview(copy), 3)
        assert copy == b"3456"
        opened.check()


def test_mapping_is_kept_when_its_slot_comes_back(block: Block, cache: SegmentCache) -> None:
    with open_block(bytes(200), HOST) as other:
        addresses = []
        for turn in (block, other, block, other):
            with cache.open_all([turn.segment()], [200]) as (opened,):
                assert isinstance(opened, OpenMemory)
                addresses.append(opened.address)
        assert addresses[0] == addresses[2]
        assert addresses[1] == addresses[3]
    cache.close()
    assert not mapped_for_reading(block)
    assert not mapped_for_reading(other)


def test_mapping_is_closed_when_its_owner_is_gone_and_it_is_not_read(
    block: Block, cache: SegmentCache
) -> None:
    with open_block(bytes(200), HOST) as other:
        for _ in range(2):
            for one in (other, block):
                with cache.open_all([one.segment()], [200]):
                    pass
        fcntl.flock(other.fd, fcntl.LOCK_UN)  # as when a process is killed: its file stays
        with cache.open_all([other.segment()], [200]):
            assert mapped_for_reading(other), "what is read stays"
        assert mapped_for_reading(other)
        with cache.open_all([block.segment()], [200]):
            pass
        assert not mapped_for_reading(other)
        assert mapped_for_reading(block)


def test_block_is_mapped_again_when_made_anew_under_its_name(cache: SegmentCache) -> None:
    for value in (1, 2):
        with open_block(bytes([value]) * 50, HOST, name="weightbus-test-anew") as block:
            with cache.open_all([block.segment()], [50]) as (opened,):
                copy = bytearray(50)
                opened.read_into(memoryview(copy), 0)
            assert copy == bytes([value]) * 50


def test_block_is_refused_when_made_anew_within_one_update(cache: SegmentCache) -> None:
    """A layout that names one block twice must not unmap what it still reads."""
    with open_block(bytes(50), HOST, name="weightbus-test-twice") as block:

        def sources() -> Iterator[SharedMemorySegment]:
            yield block.segment()
            block.unlink()
            with open_block(bytes(60), HOST, name="weightbus-test-twice") as other:
                yield other.segment()

        with (
            pytest.raises(SegmentUnavailable, match="made anew meanwhile"),
            cache.open_all(sources(), [50, 50]),
        ):
            pass


def test_torn_read_is_noticed_when_generation_moves(block: Block, cache: SegmentCache) -> None:
    segment = block.segment()
    with cache.open_all([segment], [200]) as (opened,):
        block.generation += 1
        with pytest.raises(TornRead, match="has generation 3: it must be 2"):
            opened.check()
    with pytest.raises(TornRead), cache.open_all([segment], [200]):
        pass
    with pytest.raises(TornRead):
        probe_segment(segment, 200, HOST, [])


def test_torn_read_is_noticed_when_file_is_written(tmp_path: Path, cache: SegmentCache) -> None:
    segment = write(tmp_path / "a", bytes(10))
    with cache.open_all([segment], [10]) as (opened,):
        os.utime(tmp_path / "a", ns=(0, 5))
        with pytest.raises(TornRead, match="has generation 5"):
            opened.check()


def test_stamped_file_is_refused_when_it_was_written_before_it_was_opened(
    tmp_path: Path, cache: SegmentCache
) -> None:
    path = tmp_path / "a"
    segment = stamped(write(path, b"0123456789"))
    assert segment.size_bytes == 10
    with cache.open_all([segment], [10]) as (opened,):
        opened.check()
    path.write_bytes(b"9876543210")
    os.utime(path, ns=(0, segment.modified_ns + 1))
    with pytest.raises(TornRead, match=str(path)), cache.open_all([segment], [10]):
        pytest.fail("opened")
    with pytest.raises(TornRead, match=str(path)):
        probe_segment(segment, 10, HOST, [str(tmp_path)])
    path.write_bytes(b"0123456789a")
    os.utime(path, ns=(0, segment.modified_ns))
    with (
        pytest.raises(SegmentUnavailable, match="11 bytes long: must be 10"),
        cache.open_all([segment], [10]),
    ):
        pytest.fail("opened")
    with cache.open_all([FileSegment(path=str(path))], [10]) as (opened,):
        opened.check()


def test_stamp_is_refused_when_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SegmentUnavailable, match="absent"):
        stamped(FileSegment(path=str(tmp_path / "absent")))


def test_process_lives_when_file_is_shortened_while_it_is_read(
    tmp_path: Path, cache: SegmentCache
) -> None:
    segment = write(tmp_path / "a", bytes(10_000))
    with cache.open_all([segment], [10_000]) as (opened,):
        os.truncate(tmp_path / "a", 100)
        with pytest.raises(SegmentUnavailable, match="100 bytes long: must hold at least 10000"):
            opened.read_into(memoryview(bytearray(10_000)), 0)


def test_file_outside_the_roots_is_refused_when_linked_into_them(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, cache: SegmentCache
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "secret"
    outside.write_bytes(bytes(10))
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "directory").symlink_to(outside.parent)
    (tmp_path / "inside").write_bytes(bytes(10))
    (tmp_path / "fine").symlink_to(tmp_path / "inside")
    for path in (outside, tmp_path / "link", tmp_path / "directory/secret", tmp_path / "../secret"):
        with pytest.raises(SegmentUnavailable, match="must lie below"):
            probe_segment(FileSegment(path=str(path)), 10, HOST, [str(tmp_path)])
    probe_segment(FileSegment(path=str(tmp_path / "fine")), 10, HOST, [str(tmp_path)])
    with pytest.raises(SegmentUnavailable, match="must lie below no root"):
        probe_segment(FileSegment(path=str(tmp_path / "fine")), 10, HOST, [])


def test_segment_is_refused_when_it_is_not_what_was_promised(tmp_path: Path, block: Block) -> None:
    os.mkfifo(tmp_path / "pipe")
    plain = Path("/dev/shm/weightbus-test-plain")
    plain.write_bytes(b"x" * 100)
    try:
        with open_block(bytes(8), "other-host") as foreign:
            for segment, reason in (
                (FileSegment(path=str(tmp_path / "absent")), "No such file"),
                (FileSegment(path=str(tmp_path / "pipe")), "not a regular file"),
                (FileSegment(path=str(tmp_path)), "not a regular file"),
                (write(tmp_path / "short", b"123"), "3 bytes long: must hold at least 8 bytes"),
                (foreign.segment(), "on host other-host: must be on this one, this-host"),
                (
                    SharedMemorySegment(name="weightbus-absent", host_id=HOST, generation=2),
                    "No such file",
                ),
                (
                    SharedMemorySegment(name=plain.name, host_id=HOST, generation=2),
                    "not a block of ours",
                ),
                (
                    RemoteSegment(protocol="tcp", session="h:1", address=0, generation=0),
                    "must be a file or shared memory",
                ),
            ):
                with pytest.raises(SegmentUnavailable, match=reason):
                    probe_segment(segment, 8, HOST, [str(tmp_path)])
    finally:
        plain.unlink()
    with pytest.raises(SegmentUnavailable, match="200 bytes long: must hold at least 201"):
        probe_segment(block.segment(), 201, HOST, [])


def test_no_descriptor_is_left_open_when_one_of_several_is_refused(
    tmp_path: Path, cache: SegmentCache
) -> None:
    good = write(tmp_path / "a", bytes(10))
    before = len(os.listdir("/proc/self/fd"))
    with (
        pytest.raises(SegmentUnavailable),
        cache.open_all([good, FileSegment(path=str(tmp_path / "b"))], [10, 10]),
    ):
        pass
    with pytest.raises(SegmentUnavailable):
        probe_segment(good, 11, HOST, [str(tmp_path)])
    assert len(os.listdir("/proc/self/fd")) == before
