"""Blocks of GPU memory, and the GPUs that the kernel lists."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from tests.fake_cuda import FakeCuda, fake_uuid
from weightbus.bus.cuda import CUDA_ALIGNMENT_BYTES, CudaBlock, host_device_uuids
from weightbus.bus.errors import CudaFailed
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES, unpack_shm_header


def generation_seen(reader: FakeCuda, base: int) -> int:
    return unpack_shm_header(reader.read(0, base, SHM_HEADER_BYTES))[1]


def test_block_is_read_by_another_process_when_opened_by_its_handle() -> None:
    cuda = FakeCuda(devices=2)
    reader = cuda.other_process()
    block = CudaBlock(cuda, 1, 1000, generation=6)
    assert (block.device, block.device_uuid, block.size_bytes) == (1, fake_uuid(1), 1000)
    assert block.address % 256 == 0
    base = reader.open_handle(0, block.handle)
    assert unpack_shm_header(reader.read(0, base, SHM_HEADER_BYTES)) == (1000, 6)
    assert block.begin_write() == block.address
    assert generation_seen(reader, base) == 7
    ctypes.memmove(block.address, b"data", 4)
    assert block.end_write() == block.generation == 8
    assert generation_seen(reader, base) == 8
    assert reader.read(0, base + SHM_HEADER_BYTES, 4) == b"data"
    reader.close_handle(0, base)
    block.close()
    block.close()
    cuda.assert_clean()


def test_block_shares_its_pages_with_no_other_when_exported() -> None:
    cuda = FakeCuda()
    blocks = [CudaBlock(cuda, 0, size) for size in (0, 1, CUDA_ALIGNMENT_BYTES)]
    sizes = [size // CUDA_ALIGNMENT_BYTES for size in cuda.allocated.values()]
    assert sizes == [1, 1, 2]
    assert not [size for size in cuda.allocated.values() if size % CUDA_ALIGNMENT_BYTES]
    for block in blocks:
        block.close()


def test_generation_stays_odd_when_a_write_is_begun_again() -> None:
    block = CudaBlock(FakeCuda(), 0, 8)
    block.begin_write()
    block.begin_write()
    assert block.generation == 1
    assert block.end_write() == 2


@pytest.mark.parametrize("method", ["allocate", "write", "export"])
def test_nothing_is_left_when_a_block_cannot_be_made(method: str) -> None:
    cuda = FakeCuda()
    cuda.fail(method)
    with pytest.raises(CudaFailed, match="CUDA_ERROR_OUT_OF_MEMORY: out of memory"):
        CudaBlock(cuda, 0, 100)
    cuda.assert_clean()


def test_generation_is_not_even_again_when_the_last_word_cannot_be_written() -> None:
    cuda = FakeCuda()
    block = CudaBlock(cuda, 0, 100)
    block.begin_write()
    cuda.fail("write", "CUDA_ERROR_ECC_UNCORRECTABLE")
    with pytest.raises(CudaFailed):
        block.end_write()
    _, in_memory = unpack_shm_header(cuda.read(0, block.address - SHM_HEADER_BYTES, 64))
    assert in_memory == 1
    assert block.begin_write() == block.address
    assert block.generation > in_memory
    assert block.end_write() % 2 == 0


def test_uuids_of_the_host_are_those_that_the_kernel_lists(tmp_path: Path) -> None:
    assert host_device_uuids(tmp_path / "absent") == frozenset()
    for number, uuid in enumerate((fake_uuid(0), fake_uuid(1), "GPU-????????-????")):
        place = tmp_path / "gpus" / f"0000:0{number}:00.0"
        place.mkdir(parents=True)
        text = (
            f"Model: \t\t NVIDIA H200\nIRQ:   \t\t 97\nGPU UUID: \t {uuid}\nVideo BIOS: \t 96.00\n"
        )
        (place / "information").write_text(text)
    assert host_device_uuids(tmp_path / "gpus") == {fake_uuid(0), fake_uuid(1)}
