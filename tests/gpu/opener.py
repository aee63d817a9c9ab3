"""Another process, as a worker of an engine: `python -m tests.gpu.opener TASK ...`, for test_cuda.

Answers line by line on stdout; what it holds it lets go of when its stdin ends.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys

from weightbus.bus.cuda import host_device_uuids, open_cuda
from weightbus.bus.errors import CudaFailed
from weightbus.consumers.errors import ConsumerError
from weightbus.consumers.transfer.segments import OpenDevice, SegmentCache
from weightbus.schemas.placement import CudaSegment


def say(text: object) -> None:
    print(text, flush=True)


def has_context(device: int) -> bool:
    """Asks the driver itself: the answer makes none."""
    library, flags, active = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint(), ctypes.c_int()
    library.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
    return bool(active.value)


def ask_questions() -> None:
    """Whatever a consumer asks; then which devices have a context."""
    cuda = open_cuda()
    count = cuda.device_count()
    for device in range(count):
        uuid = cuda.device_uuid(device)
        assert cuda.find_device(uuid) == device
        cuda.can_register_read_only(device)
        say(uuid)
    host_device_uuids()
    say(f"contexts {[device for device in range(count) if has_context(device)]}")
    sys.stdin.read()


def read_segment(device: str, uuid: str, handle: str, generation: str, size: str) -> None:
    """Open a segment as a worker does, by a kernel and by copies; then as often as stdin has lines:
    is it still whole?"""
    from tests.gpu.peek import peek

    segment = CudaSegment(
        handle=bytes.fromhex(handle), host_id="h", device_uuid=uuid, generation=int(generation)
    )
    cache, number = SegmentCache("h", (), f"cuda:{device}"), int(device)
    with cache.open_all([segment], [int(size)]) as (opened,):
        assert isinstance(opened, OpenDevice)
        cuda = open_cuda()
        say(opened.address)
        try:
            say(cuda.size_bytes(number, opened.address - 4096))
        except CudaFailed:
            say("not told")
        say(f"contexts {[one for one in range(cuda.device_count()) if has_context(one)]}")
        say(hashlib.sha256(peek(number, opened.address, int(size))).hexdigest())
        data = bytearray(int(size))
        opened.read_into(memoryview(data), 0)
        say(hashlib.sha256(data).hexdigest())
        for _ in sys.stdin:
            try:
                opened.check()
            except ConsumerError as error:
                say(f"{type(error).__name__}: {error}")
            else:
                say("whole")
    cache.close()
    try:
        cuda.open_handle(number, bytes(64))
    except CudaFailed as error:
        say(error)


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        ask_questions()
    else:
        read_segment(*sys.argv[2:])
