"""A CUDA of host memory: several devices, several processes, errors on demand, and who leaks what.

`FakeCuda()` is one process of a machine of its own; `fake.other_process()` another of the same
machine, which can open what the first exports. Addresses are those of ordinary memory: what a
device would read can be read with ctypes.

As strict as a driver where that finds faults: addresses must lie in live allocations, open handles
or registered memory; registered memory must be mapped, and writable unless it is registered
read-only. What would be undefined is noted in `undefined`. `assert_clean` at the end of a test.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from weightbus.bus.cuda import CUDA_HANDLE_BYTES, CudaRuntime
from weightbus.bus.errors import CudaFailed, CudaTimeout

__all__ = ("FakeCuda", "fake_uuid")

PAGE_BYTES: Final = 4096
OUT_OF_MEMORY: Final = "CUDA_ERROR_OUT_OF_MEMORY: out of memory"


def fake_uuid(device: int) -> str:
    """Of a device of a machine whose UUIDs are not given."""
    return f"GPU-{uuid.UUID(int=device + 1)}"


@dataclass
class _Allocation:
    owner: FakeCuda
    device: int
    address: int
    size_bytes: int
    memory: ctypes.Array[ctypes.c_char]
    handle: bytes
    open_by: int = 0
    freed: bool = False


@dataclass
class _Machine:
    """What all processes of a machine share."""

    uuids: tuple[str, ...]
    device_bytes: int
    allocations: dict[int, _Allocation] = field(default_factory=dict)
    """By address; also those that are freed: their addresses are not used again."""
    processes: list[FakeCuda] = field(default_factory=list)
    undefined: list[str] = field(default_factory=list)


class FakeCuda(CudaRuntime):
    """One process.

    Args:
        devices: how many the machine has.
        read_only: whether its devices know read-only registration.
        device_bytes: memory of each.
        visible: numbers of the machine's devices that this process may use; None: all of them.
        machine: of `other_process`.
    """

    def __init__(
        self,
        devices: int = 1,
        *,
        read_only: bool = True,
        device_bytes: int = 2**30,
        visible: tuple[int, ...] | None = None,
        machine: _Machine | None = None,
    ) -> None:
        uuids = tuple(map(fake_uuid, range(devices)))
        self._machine = machine or _Machine(uuids, device_bytes)
        self._machine.processes.append(self)
        everything = tuple(range(len(self._machine.uuids)))
        self.visible = everything if visible is None else visible
        self.read_only = read_only
        self.calls: Counter[str] = Counter()
        """Method -> how often it was called."""
        self.contexts: set[int] = set()
        """Devices that this process has made a context on."""
        self.opened: Counter[tuple[int, int]] = Counter()
        """(Device, address) -> how often it is open."""
        self.registered: dict[int, tuple[int, bool]] = {}
        """Address -> (bytes, whether read-only)."""
        self.streams: set[int] = set()
        self.events: dict[int, bool] = {}
        """Event -> whether it is done."""
        self.held = False
        """True: what is queued is not done before `proceed`."""
        self._queue: list[tuple[int, Callable[[], None]]] = []
        self._faults: dict[str, list[str | None]] = {}
        self._numbers = itertools.count(0x1000)
        self._thread = threading.local()

    def other_process(
        self, *, visible: tuple[int, ...] | None = None, read_only: bool | None = None
    ) -> FakeCuda:
        """Another process of this machine."""
        read_only = self.read_only if read_only is None else read_only
        return FakeCuda(read_only=read_only, visible=visible, machine=self._machine)

    def fail(self, method: str, reason: str = OUT_OF_MEMORY, *, after: int = 0) -> None:
        """One call of a method fails, after so many that do not."""
        assert hasattr(self, method)
        self._faults[method] = [*[None] * after, reason]

    @property
    def undefined(self) -> list[str]:
        """What any process of the machine did that CUDA leaves undefined."""
        return self._machine.undefined

    @property
    def allocated(self) -> dict[int, int]:
        """Address -> bytes of what this process has allocated."""
        return {
            found.address: found.size_bytes
            for found in self._machine.allocations.values()
            if found.owner is self and not found.freed
        }

    def assert_clean(self) -> None:
        """No process of the machine has left anything, or done what is undefined."""
        for process in self._machine.processes:
            assert not process.allocated, f"allocations left: {process.allocated}"
            assert not +process.opened, f"handles left open: {+process.opened}"
            assert not process.registered, f"memory left registered: {process.registered}"
            assert not process.events, f"events left: {process.events}"
        assert not self.undefined, self.undefined

    def proceed(self, count: int | None = None) -> None:
        """Do what is queued, or `count` of it, in the order in which it was queued."""
        done, self._queue = self._queue[:count], self._queue[len(self._queue[:count]) :]
        for _, work in done:
            work()

    # -- questions

    def device_count(self) -> int:
        self._enter("device_count")
        return len(self.visible)

    def device_uuid(self, device: int) -> str:
        self._enter("device_uuid")
        return self._machine.uuids[self._number(device)]

    def find_device(self, uuid: str) -> int | None:
        self._enter("find_device")
        uuids = [self._machine.uuids[number] for number in self.visible]
        return uuids.index(uuid) if uuid in uuids else None

    def can_register_read_only(self, device: int) -> bool:
        self._enter("can_register_read_only")
        self._number(device)
        return self.read_only

    # -- device memory

    def free_bytes(self, device: int) -> int:
        self._enter("free_bytes", device)
        number = self._number(device)
        used = sum(
            found.size_bytes
            for found in self._machine.allocations.values()
            if found.device == number and not found.freed
        )
        return self._machine.device_bytes - used

    def allocate(self, device: int, size_bytes: int) -> int:
        self._enter("allocate", device)
        if size_bytes > self.free_bytes(device):
            raise CudaFailed("allocate", f"{size_bytes:,} bytes", OUT_OF_MEMORY)
        memory = ctypes.create_string_buffer(size_bytes + PAGE_BYTES)
        address = -(-ctypes.addressof(memory) // PAGE_BYTES) * PAGE_BYTES
        handle = uuid.uuid4().bytes.ljust(CUDA_HANDLE_BYTES, b"\0")
        self._machine.allocations[address] = _Allocation(
            self, self._number(device), address, size_bytes, memory, handle
        )
        return address

    def free(self, device: int, address: int) -> None:
        self._enter("free", device)
        found = self._own(address)
        found.freed = True
        if found.open_by:
            self.undefined.append(f"{address:#x} was freed while open {found.open_by} times")

    def size_bytes(self, device: int, address: int) -> int:
        self._enter("size_bytes", device)
        self._check(device, address, 1)
        for found in self._machine.allocations.values():
            if found.address <= address < found.address + found.size_bytes:
                return found.address + found.size_bytes - address
        raise AssertionError("it was checked")

    def export(self, address: int) -> bytes:
        self._enter("export")
        return self._own(address).handle

    def open_handle(self, device: int, handle: bytes) -> int:
        self._enter("open_handle", device)
        found = [a for a in self._machine.allocations.values() if a.handle == handle]
        if not found or found[0].freed:
            raise CudaFailed("open_handle", handle.hex()[:16], "CUDA_ERROR_INVALID_VALUE")
        if found[0].owner is self:
            reason = "this process exported it itself, and cannot open it"
            raise CudaFailed("open_handle", handle.hex()[:16], reason)
        found[0].open_by += 1
        self.opened[device, found[0].address] += 1
        return found[0].address

    def close_handle(self, device: int, address: int) -> None:
        self._enter("close_handle", device)
        if not self.opened[device, address]:
            raise CudaFailed("close_handle", f"{address:#x}", "CUDA_ERROR_INVALID_VALUE")
        self.opened[device, address] -= 1
        self._machine.allocations[address].open_by -= 1

    # -- host memory

    def register(
        self, address: int, size_bytes: int, *, read_only: bool, device: int | None = None
    ) -> None:
        self._enter("register", 0 if device is None else device)
        value = f"{size_bytes:,} bytes at {address:#x}"
        if read_only and not self.read_only:
            raise CudaFailed("register", value, "no read-only registration")
        for known, (known_bytes, _) in self.registered.items():
            if known < address + size_bytes and address < known + known_bytes:
                raise CudaFailed(
                    "register", value, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED: already"
                )
        if address % PAGE_BYTES or not _is_mapped(address, size_bytes, writable=not read_only):
            raise CudaFailed("register", value, "CUDA_ERROR_INVALID_VALUE: invalid argument")
        self.registered[address] = (size_bytes, read_only)

    def unregister(self, address: int) -> None:
        self._enter("unregister")
        if address not in self.registered:
            reason = "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED: not registered"
            raise CudaFailed("unregister", f"{address:#x}", reason)
        size_bytes, _ = self.registered.pop(address)
        if not _is_mapped(address, size_bytes, writable=False):
            self.undefined.append(f"{address:#x} was unmapped while it was registered")

    # -- copies

    def read(self, device: int, address: int, size_bytes: int) -> bytes:
        self._enter("read", device)
        self._check(device, address, size_bytes)
        return ctypes.string_at(address, size_bytes)

    def read_into(self, device: int, address: int, buffer: memoryview) -> None:
        buffer.cast("B")[:] = self.read(device, address, buffer.nbytes)

    def write(self, device: int, address: int, data: bytes) -> None:
        self._enter("write", device)
        self._check(device, address, len(data))
        ctypes.memmove(address, data, len(data))

    def copy_async(
        self, device: int, destination: int, source: int, size_bytes: int, stream: int
    ) -> None:
        self._enter("copy_async", device)

        def copy() -> None:
            ctypes.memmove(destination, source, size_bytes)

        self._queued(stream, copy)

    def create_stream(self, device: int) -> int:
        self._enter("create_stream", device)
        stream = next(self._numbers)
        self.streams.add(stream)
        return stream

    def destroy_stream(self, device: int, stream: int) -> None:
        self._enter("destroy_stream", device)
        self.streams.remove(stream)

    def is_done(self, device: int, stream: int) -> bool:
        self._enter("is_done", device)
        return all(queued != stream for queued, _ in self._queue)

    def synchronise(self, device: int, stream: int, deadline_s: float) -> None:
        """Nothing is done meanwhile: what is not done now is late at once."""
        self._enter("synchronise", device)
        if any(queued == stream for queued, _ in self._queue):
            raise CudaTimeout("synchronising", f"{stream:#x}", deadline_s)

    def record_event(self, device: int, stream: int) -> int:
        self._enter("record_event", device)
        event = next(self._numbers)
        self.events[event] = False
        self._queued(stream, lambda: self._happen(event))
        return event

    def is_event_done(self, device: int, event: int) -> bool:
        self._enter("is_event_done", device)
        return self.events[event]

    def wait_event(self, device: int, stream: int, event: int) -> None:
        """The queue is in order anyway."""
        self._enter("wait_event", device)
        assert event in self.events
        self._queued(stream, lambda: None)

    def destroy_event(self, device: int, event: int) -> None:
        self._enter("destroy_event", device)
        del self.events[event]

    # -- other libraries

    @contextmanager
    def current(self, device: int) -> Iterator[None]:
        """Of the calling thread, as `current_device` tells."""
        self._enter("current", device)
        before = self.current_device
        self._thread.device = device
        try:
            yield
        finally:
            self._thread.device = before

    @property
    def current_device(self) -> int | None:
        """Of the calling thread; None: it has none."""
        return getattr(self._thread, "device", None)

    # -- helpers

    def _enter(self, method: str, device: int | None = None) -> None:
        self.calls[method] += 1
        if device is not None:
            self._number(device)
            self.contexts.add(device)
        faults = self._faults.get(method)
        reason = faults.pop(0) if faults else None
        if reason is not None:
            raise CudaFailed(method, "a call that was to fail", reason)

    def _number(self, device: int) -> int:
        if not 0 <= device < len(self.visible):
            raise CudaFailed("device", f"{device}", "CUDA_ERROR_INVALID_DEVICE")
        return self.visible[device]

    def _own(self, address: int) -> _Allocation:
        found = self._machine.allocations.get(address)
        if found is None or found.owner is not self or found.freed:
            raise CudaFailed("device memory", f"{address:#x}", "CUDA_ERROR_INVALID_VALUE")
        return found

    def _check(self, device: int, address: int, size_bytes: int) -> None:
        """It is memory that this device of this process can reach."""
        for found in self._machine.allocations.values():
            end = found.address + found.size_bytes
            mine = found.owner is self and not found.freed
            if (mine or self.opened[device, found.address]) and (
                found.address <= address and address + size_bytes <= end
            ):
                return
        raise CudaFailed("device memory", f"{address:#x}", "CUDA_ERROR_ILLEGAL_ADDRESS")

    def _queued(self, stream: int, work: Callable[[], None]) -> None:
        self._queue.append((stream, work))
        if not self.held:
            self.proceed()

    def _happen(self, event: int) -> None:
        if event in self.events:
            self.events[event] = True


def _is_mapped(address: int, size_bytes: int, *, writable: bool) -> bool:
    """Whether all of it is mapped readable, and writable."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        ends, rights, *_ = line.split()
        start, end = (int(each, 16) for each in ends.split("-"))
        if start <= address < end and rights[0] == "r" and (rights[1] == "w" or not writable):
            if address + size_bytes <= end:
                return True
            address, size_bytes = end, address + size_bytes - end
    return False
