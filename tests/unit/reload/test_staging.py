"""Addresses of segments: what is fetched, what is registered, and what is read where it lies."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fake_cuda import FakeCuda
from tests.unit.transfer.publishing import HOST
from weightbus.bus.cuda import CudaBlock
from weightbus.consumers.errors import SegmentUnavailable
from weightbus.consumers.reload.staging import ByteRange, StagedSources
from weightbus.consumers.transfer.gpu import Gpu
from weightbus.consumers.transfer.segments import OpenSegment, SegmentCache
from weightbus.schemas.placement import CudaSegment, FileSegment, Segment

PAGE = 4096
FILE_BYTES = 100 * PAGE
CONTENT = bytes(range(251)) * (FILE_BYTES // 251 + 1)
RANGES = (ByteRange(0, 10, 300), ByteRange(0, 40 * PAGE - 1, 41 * PAGE + 1), ByteRange(1, 0, 7))


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    fake = FakeCuda()
    yield fake
    assert fake.undefined == []


@pytest.fixture
def files(tmp_path: Path) -> list[Segment]:
    paths = [tmp_path / "0", tmp_path / "1"]
    for number, path in enumerate(paths):
        path.write_bytes(CONTENT[number : number + FILE_BYTES])
    return [FileSegment(path=str(path)) for path in paths]


@contextmanager
def opened(
    segments: Sequence[Segment], fake: FakeCuda, root: Path, size_bytes: int = FILE_BYTES
) -> Iterator[tuple[OpenSegment, ...]]:
    cache = SegmentCache(HOST, [str(root)], "cuda:0", lambda: fake)
    with cache.open_all(segments, [size_bytes] * len(segments)) as found:
        yield found
    cache.close()


def read(address: int, wanted: ByteRange) -> bytes:
    return ctypes.string_at(address + wanted.start, wanted.end - wanted.start)


def check_fetched(sources: StagedSources) -> None:
    for wanted in RANGES:
        expected = CONTENT[wanted.segment + wanted.start : wanted.segment + wanted.end]
        assert read(sources.addresses[wanted.segment], wanted) == expected


def test_gpu_reads_what_was_fetched_while_it_is_registered(
    files: list[Segment], fake: FakeCuda, tmp_path: Path
) -> None:
    gpu = Gpu(0, lambda: fake)
    with opened(files, fake, tmp_path) as segments, StagedSources(segments, gpu) as sources:
        for _ in range(2):
            with sources.fetched(RANGES):
                check_fetched(sources)
                first, second = sources.addresses
                assert {
                    address: size for address, (size, _) in sorted(fake.registered.items())
                } == {first: PAGE, first + 39 * PAGE: 3 * PAGE, second: PAGE}
            assert fake.registered == {}
    assert fake.calls["register"] == fake.calls["unregister"] == 2 * len(RANGES)


def test_nothing_is_registered_when_a_processor_reads(
    files: list[Segment], fake: FakeCuda, tmp_path: Path
) -> None:
    opening = opened(files, fake, tmp_path)
    with opening as segments, StagedSources(segments) as sources, sources.fetched(RANGES):
        check_fetched(sources)
    assert not fake.calls["register"]


def test_what_was_registered_is_let_go_when_the_gpu_refuses_the_next(
    files: list[Segment], fake: FakeCuda, tmp_path: Path
) -> None:
    fake.fail("register", "CUDA_ERROR_OUT_OF_MEMORY: out of memory", after=1)
    gpu = Gpu(0, lambda: fake)
    with opened(files, fake, tmp_path) as segments, StagedSources(segments, gpu) as sources:
        with pytest.raises(SegmentUnavailable, match="out of memory"), sources.fetched(RANGES):
            pytest.fail("it was not all registered")
        assert fake.registered == {}
        with sources.fetched(RANGES):
            check_fetched(sources)


def test_memory_that_the_gpu_does_not_let_go_of_stays_as_it_is(
    files: list[Segment], fake: FakeCuda, tmp_path: Path
) -> None:
    """A device that is lost may still read there, for all that anyone knows."""
    gpu = Gpu(0, lambda: fake)
    opening = opened(files, fake, tmp_path)
    with opening as segments, StagedSources(segments, gpu) as sources, sources.fetched(RANGES):
        fake.fail("unregister", "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")
    (left,) = fake.registered
    assert left == sources.addresses[0]
    assert read(left, RANGES[0]) == CONTENT[RANGES[0].start : RANGES[0].end]


def test_segment_is_refused_when_the_gpu_did_not_let_go_of_it(
    files: list[Segment], fake: FakeCuda, tmp_path: Path
) -> None:
    """Its addresses cannot be registered again, and what is there is of the step before."""
    gpu = Gpu(0, lambda: fake)
    with opened(files, fake, tmp_path) as segments, StagedSources(segments, gpu) as sources:
        with sources.fetched(RANGES):
            fake.fail("unregister", "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")
        later = ByteRange(0, 60 * PAGE, 61 * PAGE)
        refused = pytest.raises(SegmentUnavailable, match="still registered with the GPU")
        with refused, sources.fetched([RANGES[2], later]):
            pytest.fail("nothing can be fetched there")
        assert list(fake.registered) == [sources.addresses[0]]
        with sources.fetched([RANGES[2]]) as fetched_bytes:
            assert fetched_bytes == RANGES[2].end - RANGES[2].start
            assert read(sources.addresses[1], RANGES[2]) == CONTENT[1:8]


def test_memory_of_a_gpu_is_read_where_it_lies_only_by_a_gpu(
    fake: FakeCuda, tmp_path: Path
) -> None:
    publisher = fake.other_process()
    block = CudaBlock(publisher, 0, PAGE)
    ctypes.memmove(block.begin_write(), CONTENT, PAGE)
    segment = CudaSegment(
        handle=block.handle,
        host_id=HOST,
        device_uuid=block.device_uuid,
        generation=block.end_write(),
    )
    wanted = ByteRange(0, 5, PAGE)
    with opened([segment], fake, tmp_path, PAGE) as (found,):
        by_gpu = StagedSources([found], Gpu(0, lambda: fake))
        with by_gpu as sources, sources.fetched([wanted]) as fetched_bytes:
            assert fetched_bytes == 0
            assert sources.addresses == (block.address,)
        with StagedSources([found]) as sources, sources.fetched([wanted]) as fetched_bytes:
            assert fetched_bytes == PAGE - 5
            assert sources.addresses != (block.address,)
            assert read(sources.addresses[0], wanted) == CONTENT[5:PAGE]
    block.close()
    fake.assert_clean()
