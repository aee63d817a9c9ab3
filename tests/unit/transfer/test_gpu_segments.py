"""A worker on a GPU: handles open on its own device, mappings registered with it, nothing left."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from msgspec.structs import replace

from tests.fake_cuda import FakeCuda, fake_uuid
from tests.unit.transfer.blocks import Block, open_block
from weightbus.bus.cuda import CudaBlock
from weightbus.bus.errors import CudaUnavailable
from weightbus.consumers.errors import SegmentUnavailable, TornRead
from weightbus.consumers.transfer.device_filler import COPY_BYTES
from weightbus.consumers.transfer.gpu import REGISTERED_BYTES, Gpu, check_cuda_segment, is_gpu
from weightbus.consumers.transfer.segments import (
    KEPT_MAPPINGS,
    KEPT_OPENINGS,
    OpenDevice,
    OpenMemory,
    SegmentCache,
    probe_segment,
)
from weightbus.schemas.placement import CudaSegment
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES, pack_shm_header

HOST = "this-host"
DATA = bytes(range(200))


class Trainer:
    """A publisher on GPU 1 of two, and the machine that it shares with readers."""

    def __init__(self) -> None:
        self.cuda = FakeCuda(devices=2)
        self.blocks: list[CudaBlock] = []

    def slot(self, data: bytes = DATA) -> CudaBlock:
        block = CudaBlock(self.cuda, 1, len(data))
        ctypes.memmove(block.begin_write(), data, len(data))
        block.end_write()
        self.blocks.append(block)
        return block

    def end(self) -> None:
        for block in self.blocks:
            block.close()
        self.cuda.assert_clean()


def segment_of(block: CudaBlock) -> CudaSegment:
    return CudaSegment(
        handle=block.handle,
        host_id=HOST,
        device_uuid=block.device_uuid,
        generation=block.generation,
    )


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    """At the end nothing may be left, by nobody."""
    trainer = Trainer()
    yield trainer
    trainer.end()


@contextmanager
def reading(cuda: FakeCuda, device: str = "cuda:0") -> Iterator[SegmentCache]:
    cache = SegmentCache(HOST, (), device, lambda: cuda)
    try:
        yield cache
    finally:
        cache.close()


def rights(block: Block) -> list[str]:
    """Of the mappings of a block beside the writer's own."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = sorted(line.split()[1] for line in lines if block.name in line)
    found.remove("rw-s")
    return found


# -- memory of GPUs


def test_device_memory_is_read_in_place_on_the_readers_own_device(trainer: Trainer) -> None:
    block, worker = trainer.slot(), trainer.cuda.other_process()
    with reading(worker) as cache, cache.open_all([segment_of(block)], [200]) as (opened,):
        assert isinstance(opened, OpenDevice)
        assert set(worker.opened) == {(0, opened.address - SHM_HEADER_BYTES)}
        assert worker.contexts == {0}, "none on the trainer's device"
        assert ctypes.string_at(opened.address, 200) == DATA
        copy = bytearray(3)
        opened.read_into(memoryview(copy), 197)
        assert copy == DATA[197:]
        opened.check()
        with pytest.raises(SegmentUnavailable, match="200 bytes long: must hold at least 201"):
            opened.read_into(memoryview(copy), 198)


def test_device_memory_of_a_gpu_that_the_worker_was_not_given_is_refused_when_unlisted(
    trainer: Trainer,
) -> None:
    block, worker = trainer.slot(), trainer.cuda.other_process(visible=(0,))
    with (
        reading(worker) as cache,
        pytest.raises(
            SegmentUnavailable, match=f"on no GPU of this host: must be on {fake_uuid(0)}"
        ),
        cache.open_all([segment_of(block)], [200]),
    ):
        pytest.fail("opened")


def test_device_memory_of_a_gpu_that_the_worker_was_not_given_is_opened_when_the_host_has_it(
    trainer: Trainer,
) -> None:
    block, worker = trainer.slot(), trainer.cuda.other_process(visible=(0,))
    gpu = Gpu(0, lambda: worker, lambda: {fake_uuid(0), fake_uuid(1)})
    handle = gpu.opened(segment_of(block), update=1)
    assert gpu.read("slot", handle.base + SHM_HEADER_BYTES, 200) == DATA
    gpu.close_handles(used_before=1)
    assert +worker.opened
    gpu.close_handles(used_before=2)
    assert not +worker.opened


def test_handle_is_opened_once_and_closed_once_when_slots_take_turns(trainer: Trainer) -> None:
    blocks, worker = [trainer.slot(), trainer.slot()], trainer.cuda.other_process()
    with reading(worker) as cache:
        for turn in range(6):
            segment = segment_of(blocks[turn % 2])
            with cache.open_all([segment, segment], [200, 100]) as opened:
                assert len(opened) == 2
        assert worker.calls["open_handle"] == 2
        for _ in range(KEPT_OPENINGS):
            with cache.open_all([segment_of(blocks[1])], [200]):
                pass
        assert +worker.opened == {(0, blocks[1].address - SHM_HEADER_BYTES): 1}
    assert not +worker.opened


def test_publisher_may_free_its_memory_when_the_worker_was_told_that_it_ended(
    trainer: Trainer,
) -> None:
    block, worker = trainer.slot(), trainer.cuda.other_process()
    with reading(worker) as cache, open_block(DATA, HOST) as kept:
        with cache.open_all([segment_of(block), kept.segment()], [200, 200]):
            pass
        cache.close_handles()
        assert not +worker.opened
        block.close()
        assert not trainer.cuda.undefined
        assert worker.registered, "shared memory needs no such word"
        other = trainer.slot()
        with cache.open_all([segment_of(other), kept.segment()], [200, 200]):
            pass
        assert worker.calls["register"] == 1


def test_freeing_is_noticed_by_the_fake_when_a_reader_has_it_open(trainer: Trainer) -> None:
    block, worker = trainer.slot(), trainer.cuda.other_process()
    with reading(worker) as cache:
        with cache.open_all([segment_of(block)], [200]):
            block.close()
        assert len(trainer.cuda.undefined) == 1
    trainer.cuda.undefined.clear()


def test_torn_read_is_noticed_when_a_slot_is_written_again(trainer: Trainer) -> None:
    block, worker = trainer.slot(), trainer.cuda.other_process()
    segment = segment_of(block)
    with reading(worker) as cache:
        with cache.open_all([segment], [200]) as (opened,):
            block.begin_write()
            with pytest.raises(TornRead, match="has generation 3: it must be 2"):
                opened.check()
            block.end_write()
        with pytest.raises(TornRead), cache.open_all([segment], [200]):
            pytest.fail("opened")
        with cache.open_all([segment_of(block)], [200]) as (opened,):
            opened.check()


def test_handle_is_opened_anew_when_its_memory_became_another_allocation(trainer: Trainer) -> None:
    """As when a publisher frees a slot and is given the same place again."""
    block, worker = trainer.slot(), trainer.cuda.other_process()
    segment = segment_of(block)
    with reading(worker) as cache:
        with cache.open_all([segment], [200]):
            pass
        ctypes.memmove(block.begin_write(), DATA[::-1], 200)
        block.end_write()
        with cache.open_all([segment_of(block)], [200]):
            assert worker.calls["open_handle"] == 1, "another version needs no other handle"
        with (
            pytest.raises(TornRead),
            cache.open_all([segment_of(block), segment], [200, 200]),
        ):
            pytest.fail("opened")
        assert worker.calls["open_handle"] == 1, "what is read is not closed"
        with pytest.raises(TornRead), cache.open_all([segment], [200]):
            pytest.fail("opened")
        assert worker.calls["open_handle"] == worker.calls["close_handle"] + 1 == 2


def test_worker_refuses_what_is_not_what_was_promised(trainer: Trainer) -> None:
    block, worker = trainer.slot(), trainer.cuda.other_process()
    good = segment_of(block)
    strange = trainer.cuda.allocate(1, 2 * SHM_HEADER_BYTES)
    tiny = trainer.cuda.allocate(1, 100)
    liar = trainer.cuda.allocate(1, SHM_HEADER_BYTES + 200)
    trainer.cuda.write(1, strange, b"x" * SHM_HEADER_BYTES)
    trainer.cuda.write(1, liar, pack_shm_header(2**40, 2))
    handles = [trainer.cuda.export(address) for address in (strange, tiny, liar)]
    with reading(worker) as cache:
        for segment, size_bytes, reason in (
            (replace(good, host_id="other"), 8, "on host other: must be on this one, this-host"),
            (replace(good, handle=b""), 8, "handle of 0 bytes: must be one of 64"),
            (replace(good, handle=good.handle[:63]), 8, "handle of 63 bytes: must be one of 64"),
            (replace(good, handle=good.handle + b"x"), 8, "handle of 65 bytes"),
            (replace(good, handle=bytes(64)), 8, "must be opened on device 0"),
            (replace(good, device_uuid="GPU-elsewhere"), 8, "on no GPU of this host"),
            (replace(good, handle=handles[0]), 8, "not a block of ours"),
            (replace(good, handle=handles[1]), 8, "100 bytes long: must hold at least 4104"),
            (replace(good, handle=handles[2]), 201, "200 bytes long: must hold at least 201"),
            (good, 201, "200 bytes long: must hold at least 201"),
        ):
            with (
                pytest.raises(SegmentUnavailable, match=reason),
                cache.open_all([segment], [size_bytes]),
            ):
                pytest.fail("opened")
    assert not +worker.opened
    for address in (strange, tiny, liar):
        trainer.cuda.free(1, address)


def test_process_is_told_so_when_it_opens_what_it_exported_itself(trainer: Trainer) -> None:
    block = trainer.slot()
    with (
        reading(trainer.cuda) as cache,
        pytest.raises(SegmentUnavailable, match=r"exported it itself.*by another process"),
        cache.open_all([segment_of(block)], [200]),
    ):
        pytest.fail("opened")


def test_worker_on_a_cpu_refuses_device_memory_and_asks_nothing_of_cuda(trainer: Trainer) -> None:
    segment = segment_of(trainer.slot())
    worker = trainer.cuda.other_process()
    for cache in (SegmentCache(HOST, ()), SegmentCache(HOST, (), "cpu", lambda: worker)):
        with (
            pytest.raises(SegmentUnavailable, match="by a worker on a GPU, and this one is on cpu"),
            cache.open_all([segment], [200]),
        ):
            pytest.fail("opened")
    assert not worker.calls


def test_errors_of_the_device_are_errors_of_the_segment(trainer: Trainer) -> None:
    block, worker = trainer.slot(), trainer.cuda.other_process()
    segment = segment_of(block)
    with reading(worker) as cache:
        for method in ("find_device", "open_handle", "read"):
            worker.fail(method, "CUDA_ERROR_UNKNOWN")
            with (
                pytest.raises(SegmentUnavailable, match="CUDA_ERROR_UNKNOWN"),
                cache.open_all([segment], [200]),
            ):
                pytest.fail("opened")
        with cache.open_all([segment], [200]) as (opened,):
            worker.fail("read", "CUDA_ERROR_ILLEGAL_ADDRESS")
            with pytest.raises(SegmentUnavailable, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
                opened.check()


def test_header_alone_counts_when_the_driver_does_not_tell_sizes(trainer: Trainer) -> None:
    block, worker = trainer.slot(), trainer.cuda.other_process()
    worker.fail("size_bytes", "CUDA_ERROR_NOT_SUPPORTED")
    with reading(worker) as cache:
        with cache.open_all([segment_of(block)], [200]) as (opened,):
            opened.check()
        with (
            pytest.raises(SegmentUnavailable, match="200 bytes long"),
            cache.open_all([segment_of(block)], [201]),
        ):
            pytest.fail("opened")


def test_other_handles_are_closed_when_one_cannot_be(
    trainer: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    blocks, worker = [trainer.slot(), trainer.slot()], trainer.cuda.other_process()
    with reading(worker) as cache:
        with cache.open_all(map(segment_of, blocks), [200, 200]):
            pass
        worker.fail("close_handle", "CUDA_ERROR_UNKNOWN")
    assert sum(worker.opened.values()) == 1
    assert "stays open" in caplog.text
    ((device, address),) = +worker.opened
    worker.close_handle(device, address)


def test_consumer_probes_device_memory_without_cuda(trainer: Trainer) -> None:
    good = segment_of(trainer.slot())
    probe_segment(good, 200, HOST, [])
    check_cuda_segment(good, HOST, {fake_uuid(1)})
    check_cuda_segment(replace(good, device_uuid="MIG-x"), HOST, {fake_uuid(0)})
    for segment, reason in (
        (replace(good, host_id="other"), "on host other"),
        (replace(good, handle=b"short"), "handle of 5 bytes"),
    ):
        with pytest.raises(SegmentUnavailable, match=reason):
            probe_segment(segment, 200, HOST, [])
    with pytest.raises(SegmentUnavailable, match=f"must be on {fake_uuid(0)}"):
        check_cuda_segment(good, HOST, {fake_uuid(0)})


# -- registered shared memory


@pytest.mark.parametrize("read_only", [True, False])
def test_block_is_registered_once_whole_and_as_the_device_wants_it(*, read_only: bool) -> None:
    cuda = FakeCuda(devices=4, read_only=read_only)
    with open_block(DATA, HOST) as block:
        with reading(cuda, "cuda:3") as cache:
            for _ in range(3):
                with cache.open_all([block.write(DATA)], [200]) as (opened,):
                    assert isinstance(opened, OpenMemory)
                    assert opened.address % 4096 == 0
                    whole = {opened.address - SHM_HEADER_BYTES: (SHM_HEADER_BYTES + 200, read_only)}
                    assert cuda.registered == whole
                    assert ctypes.string_at(opened.address, 200) == DATA
                    opened.check()
            assert cuda.calls["register"] == 1
            assert rights(block) == ["r--s" if read_only else "rw-s"]
            assert cuda.contexts == {3}, "no other device costs a context"
        cuda.assert_clean()
        assert rights(block) == []


def test_copies_cross_no_border_of_registrations() -> None:
    assert REGISTERED_BYTES % COPY_BYTES == 0


def test_memory_is_registered_part_by_part_and_let_go_of_whole() -> None:
    """The parts end at multiples of their size, which no copy crosses; the last may be shorter."""
    cuda, page = FakeCuda(), 4096
    gpu = Gpu(0, lambda: cuda, registered_bytes=2 * page)
    memory = mmap.mmap(-1, 6 * page)
    data = np.frombuffer(memory, dtype=np.uint8)
    address = int(data.ctypes.data) // (2 * page) * 2 * page + 3 * page  # the middle of a part
    assert gpu.register("slot", address, 2 * page + 100, read_only=False)
    parts = {address: page, address + page: page + 100}
    assert {start: size for start, (size, _) in cuda.registered.items()} == parts
    assert gpu.unregister("slot", address, memory)
    assert not cuda.registered
    cuda.fail("register", after=1)
    with pytest.raises(SegmentUnavailable, match="must be registered whole"):
        gpu.register("slot", address, 2 * page + 100, read_only=False)
    assert not cuda.registered
    del data
    cuda.assert_clean()


def test_block_is_mapped_writable_when_read_only_registration_fails_after_all() -> None:
    cuda = FakeCuda()
    cuda.fail("register", "CUDA_ERROR_NOT_SUPPORTED")
    with open_block(DATA, HOST) as block, open_block(DATA, HOST) as other:
        with reading(cuda) as cache, cache.open_all([block.segment(), other.segment()], [200, 200]):
            assert rights(block) == rights(other) == ["rw-s"]
            assert cuda.calls["register"] == 3
        cuda.assert_clean()


def test_block_is_unregistered_before_it_is_unmapped_when_unused_or_made_anew() -> None:
    cuda = FakeCuda()
    with reading(cuda) as cache:
        with open_block(DATA, HOST) as block, open_block(DATA, HOST) as other:
            with cache.open_all([block.segment()], [200]):
                pass
            for _ in range(9):  # an engine that skips versions meets a slot again late
                with cache.open_all([other.segment()], [200]):
                    pass
            assert len(cuda.registered) == 2
            with cache.open_all([block.segment()], [200]):
                assert cuda.calls["register"] == 2
            block.unlink()
            with cache.open_all([other.segment()], [200]):
                pass
            assert len(cuda.registered) == 1
            assert rights(block) == []
        for value in (1, 2):
            with (
                open_block(bytes([value]) * 50, HOST, name="weightbus-test-gpu-anew") as block,
                cache.open_all([block.segment()], [50]) as (opened,),
            ):
                assert isinstance(opened, OpenMemory)
                assert ctypes.string_at(opened.address, 50) == bytes([value]) * 50
    cuda.assert_clean()


def test_blocks_beyond_the_most_that_are_kept_are_unregistered_the_longest_unused_first() -> None:
    cuda = FakeCuda()
    with reading(cuda) as cache, ExitStack() as stack:
        blocks = [stack.enter_context(open_block(bytes(8), HOST)) for _ in range(KEPT_MAPPINGS + 2)]
        for block in blocks:
            with cache.open_all([block.segment()], [8]):
                pass
        assert len(cuda.registered) == KEPT_MAPPINGS + 1
        assert rights(blocks[0]) == []
        with cache.open_all([block.segment() for block in blocks], [8] * len(blocks)):
            assert len(cuda.registered) == len(blocks), "what is read is never too much"
    cuda.assert_clean()


def test_block_bytes_and_device_are_named_when_a_block_cannot_be_registered() -> None:
    cuda = FakeCuda(read_only=False)
    with open_block(DATA, HOST) as block, reading(cuda) as cache:
        for _ in range(2):
            cuda.fail("register")
            with (
                pytest.raises(
                    SegmentUnavailable,
                    match=f"{block.name} is 4,296 bytes that device 0 does not take "
                    r".*CUDA_ERROR_OUT_OF_MEMORY.*: must be registered whole",
                ),
                cache.open_all([block.segment()], [200]),
            ):
                pytest.fail("opened")
            assert rights(block) == []
        with cache.open_all([block.segment()], [200]):
            pass
    cuda.assert_clean()


def test_block_stays_mapped_when_the_device_does_not_let_go_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cuda = FakeCuda()
    with open_block(DATA, HOST) as block:
        with reading(cuda) as cache:
            with cache.open_all([block.segment()], [200]):
                pass
            cuda.fail("unregister", "CUDA_ERROR_ILLEGAL_ADDRESS")
        assert rights(block) == ["r--s"]
        assert f"{block.name} stays mapped" in caplog.text
        (address,) = cuda.registered
        cuda.unregister(address)
    cuda.assert_clean()


def test_what_is_missing_is_said_when_a_worker_on_a_gpu_has_no_cuda() -> None:
    def open_none() -> NoReturn:
        raise CudaUnavailable("there is no driver", "install one")

    cache = SegmentCache(HOST, (), "cuda:0", open_none)
    with (
        open_block(DATA, HOST) as block,
        pytest.raises(SegmentUnavailable, match=f"{block.name} is out of reach .*there is no driv"),
        cache.open_all([block.segment()], [200]),
    ):
        pytest.fail("opened")
    cache.close()


def test_device_is_a_gpu_when_its_name_says_so() -> None:
    assert [is_gpu(name) for name in ("cuda:0", "cuda", "cuda:13", "cpu", "meta", "")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
