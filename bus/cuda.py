"""What Weight bus needs of CUDA: device memory, IPC handles, host registration, copies. No torch.

`CudaRuntime` is the contract, for several threads at once; `open_cuda` gives this process's, and
`weightbus.bus.cuda_driver` is the only module that speaks to the driver. `CudaBlock` is one GPU
allocation that other processes of the host may read: as `SharedBlock`, but device memory.

Questions make no context: who only asks which devices there are costs no GPU memory. Methods that
work on a device make its *primary* context, the one that torch uses, and keep it until the process
ends. None changes the current device of the calling thread.

Devices are numbered as CUDA numbers them in this process (`CUDA_VISIBLE_DEVICES` applies); between
processes they are called by their UUID. Addresses are unified: one number means the same memory on
every device of the process.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Final

from weightbus.bus.errors import CudaFailed
from weightbus.schemas.shared_memory import (
    SHM_GENERATION_OFFSET,
    SHM_HEADER_BYTES,
    pack_shm_header,
)

__all__ = (
    "CUDA_ALIGNMENT_BYTES",
    "CUDA_HANDLE_BYTES",
    "CudaBlock",
    "CudaRuntime",
    "host_device_uuids",
    "open_cuda",
)

CUDA_HANDLE_BYTES: Final = 64
"""Of an IPC handle: CU_IPC_HANDLE_SIZE."""

CUDA_ALIGNMENT_BYTES: Final = 2 * 2**20
"""Of exported allocations: smaller ones share their page with others, which the handle would give
away, too (CUDA programming guide, "Interprocess Communication")."""

PROC_GPUS: Final = Path("/proc/driver/nvidia/gpus")


class CudaRuntime(ABC):
    """CUDA in this process. Several threads may use it.

    Every method with a `device` works in that device's primary context, whatever the thread's
    current device is, and leaves the thread as it was.

    Raises (all methods):
        CudaFailed: the driver refused it; the message names the call, the value and its reason.
    """

    # -- questions, which make no context

    @abstractmethod
    def device_count(self) -> int:
        """How many devices this process may use."""

    @abstractmethod
    def device_uuid(self, device: int) -> str:
        """As nvidia-smi prints it: `GPU-...`, or `MIG-...` of a MIG instance."""

    @abstractmethod
    def find_device(self, uuid: str) -> int | None:
        """The device of a UUID; None: this process may not use it."""

    @abstractmethod
    def can_register_read_only(self, device: int) -> bool:
        """Whether host memory may be registered that this process may only read."""

    # -- device memory

    @abstractmethod
    def free_bytes(self, device: int) -> int:
        """Device memory that is free now. Makes a context."""

    @abstractmethod
    def allocate(self, device: int, size_bytes: int) -> int:
        """The address of new, uninitialised device memory, aligned to 256 bytes at least."""

    @abstractmethod
    def free(self, device: int, address: int) -> None:
        """Of `allocate`. Nobody may have it open: see `CudaBlock`."""

    @abstractmethod
    def size_bytes(self, device: int, address: int) -> int:
        """From an address to the end of its allocation: of `allocate`, or of `open_handle`."""

    @abstractmethod
    def export(self, address: int) -> bytes:
        """The IPC handle (`CUDA_HANDLE_BYTES`) of what `allocate` gave."""

    @abstractmethod
    def open_handle(self, device: int, handle: bytes) -> int:
        """Map another process's allocation for `device`, which may be another GPU than its owner's.

        The driver counts how often a handle is open on a device, and gives the same address. A
        process cannot open what it exported itself.
        """

    @abstractmethod
    def close_handle(self, device: int, address: int) -> None:
        """Of `open_handle`, as often. Nothing on the device may use the address any more."""

    # -- host memory

    @abstractmethod
    def register(
        self, address: int, size_bytes: int, *, read_only: bool, device: int | None = None
    ) -> None:
        """Pin host memory and let every device read it at its host address; it stays mapped until
        `unregister`.

        Args:
            address: at a page's beginning.
            read_only: this process may only read the memory. Only if `can_register_read_only`;
                refused elsewhere.
            device: in whose context; None: one that has a context already, else device 0.
        """

    @abstractmethod
    def unregister(self, address: int) -> None:
        """Of `register`. Nothing on any device may use the address any more."""

    # -- copies

    @abstractmethod
    def read(self, device: int, address: int, size_bytes: int) -> bytes:
        """Few bytes of device memory, on a stream of our own: waits for no other stream's work.

        Raises:
            CudaTimeout: the device did not get to it.
        """

    @abstractmethod
    def read_into(self, device: int, address: int, buffer: memoryview) -> None:
        """As `read`, into memory that need not be registered: at most some MiB at a time."""

    @abstractmethod
    def write(self, device: int, address: int, data: bytes) -> None:
        """Few bytes into device memory, on a stream of our own; they are there when it returns.

        Raises:
            CudaTimeout: the device did not get to it.
        """

    @abstractmethod
    def copy_async(
        self, device: int, destination: int, source: int, size_bytes: int, stream: int
    ) -> None:
        """Queue a copy between any two of: memory of the device, opened handles, registered memory.

        Both must stay until the stream is done. Memory of the host that is not registered works,
        but may block.

        Args:
            stream: a raw `cudaStream_t` of this device: of `create_stream`, or torch's
                `stream.cuda_stream`. 0: the legacy default stream.
        """

    @abstractmethod
    def create_stream(self, device: int) -> int:
        """A stream that does not wait for the default stream."""

    @abstractmethod
    def destroy_stream(self, device: int, stream: int) -> None:
        """Of `create_stream`. What was queued is still done."""

    @abstractmethod
    def is_done(self, device: int, stream: int) -> bool:
        """Whether everything queued so far is done. Does not wait.

        Raises:
            CudaFailed: also if something that was queued earlier has failed.
        """

    @abstractmethod
    def synchronise(self, device: int, stream: int, deadline_s: float) -> None:
        """Wait until everything queued so far is done, by looking again and again.

        Raises:
            CudaTimeout: it was not done in time, and goes on.
        """

    @abstractmethod
    def record_event(self, device: int, stream: int) -> int:
        """A new event: all that is queued in the stream so far. `destroy_event` it."""

    @abstractmethod
    def is_event_done(self, device: int, event: int) -> bool:
        """Whether all that the event stands for is done. Does not wait."""

    @abstractmethod
    def wait_event(self, device: int, stream: int, event: int) -> None:
        """What is queued in the stream from now on comes after the event. Does not wait itself."""

    @abstractmethod
    def destroy_event(self, device: int, event: int) -> None:
        """Of `record_event`."""

    # -- other libraries

    @abstractmethod
    def current(self, device: int) -> AbstractContextManager[None]:
        """Within it, the device is the calling thread's current one, for a library that works on
        that."""


class CudaBlock:
    """One GPU allocation that other processes read: a header page, then data.

    The header is that of a shared-memory block. Not for several threads at once.

    Who may close it, and when: its owner only, and only when no reader has the handle open. To free
    memory that another process has open is undefined in CUDA: it may read whatever comes there
    next, or fault. The leases keep this: a reader takes one before it opens the handle; the
    publisher retires the version, then waits until all leases are gone. That keeps everybody from
    *reading* what is freed. Readers may have the handle open still, which takes long to open, until
    two updates did not use it: an open handle alone touches no memory, and whoever comes back to it
    looks at the generation word first, which has another value or cannot be read: an error of that
    reader's update, and no wrong bytes.
    """

    device: int
    device_uuid: str
    name: str
    """For messages."""
    size_bytes: int
    """Of the data, without the header."""
    address: int
    """Of the data's first byte, in this process."""
    handle: bytes
    """For `CudaSegment`."""

    def __init__(
        self, runtime: CudaRuntime, device: int, size_bytes: int, generation: int = 0
    ) -> None:
        """Allocate the block; `generation` (even) is where its word goes on from.

        Raises:
            CudaFailed: it does not fit, or cannot be exported.
        """
        assert generation % 2 == 0
        self._runtime, self.device, self.size_bytes = runtime, device, size_bytes
        self.device_uuid = runtime.device_uuid(device)
        pages = -(-(SHM_HEADER_BYTES + size_bytes) // CUDA_ALIGNMENT_BYTES)
        self._base = runtime.allocate(device, pages * CUDA_ALIGNMENT_BYTES)
        self._closed = False
        self._generation = generation
        self.address = self._base + SHM_HEADER_BYTES
        self.name = f"{self.device_uuid} at {self.address:#x}"
        try:
            header = pack_shm_header(size_bytes, generation)
            runtime.write(device, self._base, header.ljust(SHM_HEADER_BYTES, b"\0"))
            self.handle = runtime.export(self._base)
        except CudaFailed:
            self.close()
            raise

    @property
    def generation(self) -> int:
        """The word in the header; ours is its only writer."""
        return self._generation

    def begin_write(self) -> int:
        """Make the generation odd; it is when this returns. Returns the address to write to.

        Raises:
            CudaFailed: the word is odd, or as it was.
        """
        self._generation |= 1
        self._write_generation()
        return self.address

    def end_write(self) -> int:
        """Make the generation even: the data is whole. Returns the generation to promise.

        The caller has synchronised the streams that wrote the data.

        Raises:
            CudaFailed: the word may be odd still; nothing is to be promised.
        """
        self._generation += 1
        self._write_generation()
        return self._generation

    def close(self) -> None:
        """Free the memory: see above for when. Idempotent.

        Raises:
            CudaFailed: the device is in no state to do so; the memory goes with the process.
        """
        if not self._closed:
            self._closed = True
            self._runtime.free(self.device, self._base)

    def _write_generation(self) -> None:
        word = self._generation.to_bytes(8, "little")
        self._runtime.write(self.device, self._base + SHM_GENERATION_OFFSET, word)


_opened: list[CudaRuntime] = []
_opening = threading.Lock()


def open_cuda() -> CudaRuntime:
    """CUDA of this process: the same every time. Makes no context.

    Raises:
        CudaUnavailable: there is no driver, or no device that this process may use.
    """
    from weightbus.bus.cuda_driver import load_driver  # it knows this module's contract

    with _opening:
        if not _opened:
            _opened.append(load_driver())
        return _opened[0]


@cache
def host_device_uuids(directory: Path = PROC_GPUS) -> frozenset[str]:
    """UUIDs of the GPUs that this host, or container, has, as the kernel driver lists them.

    Whether this process may use them is another question, and CUDA is not asked. Empty: the system
    does not tell, or there are none. Instances of MIG are not listed. Looks once per process.
    """
    found = set()
    for path in directory.glob("*/information"):
        try:
            lines = path.read_text("ascii", "replace").splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == "GPU UUID" and "?" not in value:
                found.add(value.strip())
    return frozenset(found)
