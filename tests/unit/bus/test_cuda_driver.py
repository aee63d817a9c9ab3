"""The driver's functions are called as cuda.h says, in a context, and leave the thread as it was.

A stub of libcuda is compiled for it; where there is no C compiler this is skipped.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightbus.bus.cuda_driver import Driver, load_driver
from weightbus.bus.errors import CudaFailed, CudaTimeout, CudaUnavailable

STUB = Path(__file__).with_name("stub_cuda.c")
FOREIGN = bytes([0x5B]) * 56
"""How the stub's handles of other processes begin; an address follows."""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to build the stub of libcuda with")
    path = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, STUB], check=True)
    return str(path)


@pytest.fixture
def stub(library: str) -> Iterator[ctypes.CDLL]:
    stub = ctypes.CDLL(library)
    yield stub
    stub.stub_set(2, 0)
    assert stub.stub_pushed() == 0, "the thread's current context is as it was"


@pytest.fixture
def driver(library: str, stub: ctypes.CDLL) -> Driver:
    return load_driver(library)


def test_questions_are_answered_without_a_context_when_only_asked(
    driver: Driver, stub: ctypes.CDLL
) -> None:
    before = [stub.stub_retained(device) for device in range(2)]
    assert driver.device_count() == 2
    assert driver.device_uuid(0) == "GPU-01010101-0101-0101-0101-010101010101"
    assert driver.device_uuid(1) == "MIG-abababab-abab-abab-abab-abababababab"
    assert driver.find_device(driver.device_uuid(1)) == 1
    assert driver.find_device("GPU-elsewhere") is None
    assert [driver.can_register_read_only(device) for device in range(2)] == [True, False]
    assert [stub.stub_retained(device) for device in range(2)] == before


def test_device_memory_is_written_read_and_exported(driver: Driver) -> None:
    assert driver.free_bytes(1) == 5 << 32
    address = driver.allocate(1, 8192)
    driver.write(1, address + 8, b"\0hidden\0")
    assert driver.read(1, address, 24)[8:16] == b"\0hidden\0"
    assert driver.size_bytes(1, address + 192) == 8000
    handle = driver.export(address)
    assert handle == bytes([0x5A]) * 56 + address.to_bytes(8, "little")
    with pytest.raises(CudaFailed, match="exported it itself"):
        driver.open_handle(0, handle)
    with pytest.raises(CudaFailed, match="not allocated here"):
        driver.export(address + 8)
    driver.free(1, address)
    with pytest.raises(CudaFailed, match="not allocated here"):
        driver.export(address)
    with pytest.raises(CudaFailed, match=r"CUDA_ERROR_OUT_OF_MEMORY: out of memory"):
        driver.allocate(0, 2**31)
    with pytest.raises(CudaFailed, match="code 101"):
        driver.allocate(2, 1)


def test_handle_is_passed_whole_when_opened(driver: Driver, stub: ctypes.CDLL) -> None:
    assert driver.open_handle(0, FOREIGN + (0x7000).to_bytes(8, "little")) == 0x7000
    assert stub.stub_opened() == 1
    driver.close_handle(0, 0x7000)
    assert stub.stub_opened() == 0
    with pytest.raises(CudaFailed, match="code 1"):
        driver.open_handle(0, bytes(64))
    for length in (0, 63, 65):
        with pytest.raises(CudaFailed, match="must have 64 bytes"):
            driver.open_handle(0, bytes(length))


def test_memory_is_registered_in_a_context_that_exists_already(
    driver: Driver, stub: ctypes.CDLL
) -> None:
    driver.free_bytes(0)
    before = stub.stub_retained(1)
    driver.register(0x10000, 2**33, read_only=False)
    with pytest.raises(CudaFailed, match="code 1"):
        driver.register(0x20000, 4096, read_only=False, device=0)
    driver.register(0x20000, 2**33, read_only=True, device=0)
    assert stub.stub_retained(1) == before
    with pytest.raises(CudaFailed, match="device 1 knows no read-only registration"):
        driver.register(0x30000, 2**33, read_only=True, device=1)
    driver.unregister(0x10000)
    driver.unregister(0x20000)
    with pytest.raises(CudaFailed, match="not registered here"):
        driver.unregister(0x20000)


def test_copies_and_events_go_to_their_stream(driver: Driver, stub: ctypes.CDLL) -> None:
    stream = driver.create_stream(1)
    source, target = (ctypes.create_string_buffer(b"abcd"), ctypes.create_string_buffer(5))
    ends = ctypes.addressof(target), ctypes.addressof(source)
    driver.copy_async(1, *ends, 4, stream)
    driver.copy_async(1, *ends, 4, 0)
    assert target.value == b"abcd"
    event = driver.record_event(1, stream)
    driver.wait_event(1, stream, event)
    assert driver.is_done(1, stream)
    assert driver.is_event_done(1, event)
    driver.synchronise(1, stream, 1.0)
    stub.stub_set(2, 1)
    assert not driver.is_done(1, stream)
    assert not driver.is_event_done(1, event)
    with pytest.raises(CudaTimeout, match=r"not done within 0\.01 s"):
        driver.synchronise(1, stream, 0.01)
    stub.stub_set(2, 0)
    driver.destroy_event(1, event)
    driver.destroy_stream(1, stream)
    with pytest.raises(CudaFailed):
        driver.destroy_stream(1, 0x99)


def test_device_is_current_for_another_library_as_long_as_it_needs_it(
    driver: Driver, stub: ctypes.CDLL
) -> None:
    with driver.current(1):
        assert stub.stub_pushed() == 1
        with driver.current(0):
            assert stub.stub_pushed() == 2
        assert stub.stub_pushed() == 1


def test_cuda_is_unavailable_when_there_is_no_driver_or_no_device(
    library: str, stub: ctypes.CDLL
) -> None:
    with pytest.raises(CudaUnavailable, match=r"libcuda\.so\.1 cannot be loaded"):
        load_driver("/nowhere/libcuda.so.1")
    with pytest.raises(CudaUnavailable, match="the NVIDIA driver has no cuInit"):
        load_driver("libc.so.6")
    stub.stub_set(0, 0)
    with pytest.raises(CudaUnavailable, match="no device for this process"):
        load_driver(library)
