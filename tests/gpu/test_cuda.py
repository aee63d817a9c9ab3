"""The driver behind `weightbus.bus.cuda`, as it is: what the fake and the stub only claim."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch

from tests.unit.transfer.blocks import open_block
from weightbus.bus.blocks import SharedBlock
from weightbus.bus.cuda import CudaBlock, CudaRuntime, host_device_uuids, open_cuda
from weightbus.bus.errors import CudaFailed
from weightbus.consumers.transfer.segments import OpenMemory, SegmentCache

ROOT: Final = Path(__file__).resolve().parents[2]
MIB: Final = 2**20
SIZE: Final = 5 * MIB + 4096
COPY_S: Final = 30.0


@pytest.fixture
def cuda() -> CudaRuntime:
    return open_cuda()


@contextmanager
def other_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / ".dev"), str(ROOT), *filter(None, sys.path)])
    }
    with subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.opener", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(count)]


def ask(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    (answer,) = lines(process, 1)
    return answer


def some_bytes(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def fill(cuda: CudaRuntime, block: CudaBlock, data: bytes) -> None:
    """A new version, by a stream of its own."""
    source = ctypes.create_string_buffer(data, len(data))
    stream = cuda.create_stream(block.device)
    address = block.begin_write()
    cuda.copy_async(block.device, address, ctypes.addressof(source), len(data), stream)
    cuda.synchronise(block.device, stream, COPY_S)
    block.end_write()
    cuda.destroy_stream(block.device, stream)


def test_uuids_are_those_that_torch_and_nvidia_smi_print(cuda: CudaRuntime) -> None:
    uuids = [cuda.device_uuid(device) for device in range(cuda.device_count())]
    of_torch = [torch.cuda.get_device_properties(n).uuid for n in range(torch.cuda.device_count())]
    assert [uuid.partition("-")[2] for uuid in uuids] == [str(uuid) for uuid in of_torch]
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "-L"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert all(f"UUID: {uuid})" in listed for uuid in uuids), listed
    known = host_device_uuids()
    assert not known or set(uuids) <= known or any(uuid.startswith("MIG-") for uuid in uuids)


def test_questions_make_no_context_and_cost_no_memory() -> None:
    with torch.cuda.device(0):
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info(0)[0]
        with other_process("ask") as process:
            *uuids, contexts = lines(process, torch.cuda.device_count() + 1)
            during = torch.cuda.mem_get_info(0)[0]
    assert len(uuids) == torch.cuda.device_count()
    assert contexts == "contexts []"
    assert before - during < 64 * MIB


def test_current_device_of_the_thread_stays_when_another_is_used(
    cuda: CudaRuntime, gpus: Callable[[int], None]
) -> None:
    gpus(2)
    torch.cuda.set_device(0)
    address = cuda.allocate(1, 2 * MIB)
    cuda.write(1, address, b"12345678")
    assert cuda.read(1, address, 8) == b"12345678"
    assert torch.cuda.current_device() == 0
    assert torch.zeros(1, device="cuda").device.index == 0
    cuda.free(1, address)


@pytest.mark.parametrize(("owner", "reader"), [(0, 0), (0, 1), (1, 0)])
def test_block_is_read_by_a_kernel_of_another_process(
    cuda: CudaRuntime, gpus: Callable[[int], None], owner: int, reader: int
) -> None:
    gpus(1 + max(owner, reader))
    block = CudaBlock(cuda, owner, SIZE)
    assert block.address % 4096 == 0
    data = some_bytes(SIZE, seed=owner)
    fill(cuda, block, data)
    arguments = (str(reader), block.device_uuid, block.handle.hex(), str(block.generation))
    with other_process("read", *arguments, str(SIZE)) as process:
        address, allocation_bytes, contexts, by_kernel, by_copies = lines(process, 5)
        assert int(address) % 256 == 0
        whole = -(-(4096 + SIZE) // (2 * MIB)) * 2 * MIB
        assert allocation_bytes in (str(whole), "not told"), "its header counts if it is not told"
        assert str(reader) in contexts
        assert by_kernel == by_copies == hashlib.sha256(data).hexdigest()
        assert ask(process) == "whole"
        block.begin_write()
        assert ask(process).startswith("TornRead")
        block.end_write()
        assert ask(process).startswith("TornRead")
        assert process.stdin is not None
        process.stdin.close()
        (refused,) = lines(process, 1)
        assert refused.startswith("CUDA: cuIpcOpenMemHandle_v2"), "a handle of nobody"
        assert process.wait(60) == 0
    block.close()


def test_process_cannot_open_what_it_exported_itself(cuda: CudaRuntime) -> None:
    block = CudaBlock(cuda, 0, 100)
    with pytest.raises(CudaFailed, match="exported it itself"):
        cuda.open_handle(0, block.handle)
    block.close()


def test_memory_comes_back_when_a_block_is_closed(cuda: CudaRuntime) -> None:
    before = cuda.free_bytes(0)
    block = CudaBlock(cuda, 0, 256 * MIB)
    assert before - cuda.free_bytes(0) >= 256 * MIB
    block.close()
    assert before - cuda.free_bytes(0) < 64 * MIB


def test_too_large_a_block_is_refused_and_the_device_goes_on(cuda: CudaRuntime) -> None:
    with pytest.raises(CudaFailed, match="CUDA_ERROR_OUT_OF_MEMORY"):
        CudaBlock(cuda, 0, 2**44)
    assert torch.ones(3, device="cuda:0").sum().item() == 3


@pytest.mark.parametrize("read_only", [False, True])
def test_registered_memory_is_read_at_its_host_address(
    cuda: CudaRuntime, tmp_path: Path, *, read_only: bool
) -> None:
    from tests.gpu.peek import peek

    if read_only and not cuda.can_register_read_only(0):
        pytest.skip("this device knows no read-only registration")
    torch.cuda.init()  # type: ignore[no-untyped-call]  # before that torch calls no memory pinned
    data = some_bytes(SIZE, seed=3)
    with open_block(data, "h") as block:
        access = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
        fd = os.open(block.path, os.O_RDONLY if read_only else os.O_RDWR)
        memory = mmap.mmap(fd, 4096 + SIZE, mmap.MAP_SHARED, access)
        os.close(fd)
        view = torch.frombuffer(memory, dtype=torch.uint8) if not read_only else None
        address = int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
        cuda.register(address, 4096 + SIZE, read_only=read_only, device=0)
        assert view is None or view.is_pinned()
        assert peek(0, address + 4096, SIZE) == data
        with pytest.raises(CudaFailed, match="ALREADY_REGISTERED"):
            cuda.register(address, 4096 + SIZE, read_only=read_only)
        cuda.unregister(address)
        assert view is None or not view.is_pinned()
        del view
        memory.close()


def test_cache_registers_shared_memory_once_and_a_kernel_reads_it() -> None:
    from tests.gpu.peek import peek

    data = [some_bytes(SIZE, seed=seed) for seed in range(3)]
    with open_block(data[0], "h") as block:
        cache, addresses = SegmentCache("h", (), "cuda:0"), set()
        for content in data:
            with cache.open_all([block.write(content)], [SIZE]) as (opened,):
                assert isinstance(opened, OpenMemory)
                assert peek(0, opened.address, SIZE) == content
                opened.check()
                addresses.add(opened.address)
        cache.close()
        assert len(addresses) == 1
    assert torch.ones(3, device="cuda:0").sum().item() == 3


def test_copies_to_registered_memory_are_whole_when_their_event_is_done(cuda: CudaRuntime) -> None:
    data = some_bytes(SIZE, seed=4)
    source = CudaBlock(cuda, 0, SIZE)
    fill(cuda, source, data)
    target = SharedBlock("weightbus-test-cuda-copy", SIZE)
    base = target.address - 4096
    cuda.register(base, 4096 + SIZE, read_only=False, device=0)
    try:
        first, second = cuda.create_stream(0), cuda.create_stream(0)
        cuda.copy_async(0, target.address, source.address, SIZE, first)
        event = cuda.record_event(0, first)
        cuda.wait_event(0, second, event)
        cuda.synchronise(0, second, COPY_S)
        assert cuda.is_event_done(0, event)
        assert cuda.is_done(0, first)
        assert bytes(target.data) == data
        cuda.destroy_event(0, event)
        for stream in (first, second):
            cuda.destroy_stream(0, stream)
    finally:
        cuda.unregister(base)
        target.close()
        source.close()


def test_small_copies_wait_for_no_work_of_torch(cuda: CudaRuntime) -> None:
    """A trainer's generation word is written while its kernels run."""
    block = CudaBlock(cuda, 0, 100)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]  # a second of cycles
    block.begin_write()
    busy = not torch.cuda.current_stream().query()
    assert busy, "begin_write has waited for the default stream"
    torch.cuda.synchronize()
    block.end_write()
    block.close()
