"""What one worker's GPU reads of other processes' memory: opened IPC handles, registered mappings.

Owns the handles that are open on the worker's device, and what of this process's mappings the
device knows. Opening and registering takes long (a registration 40 ms per GiB), so both are kept
from version to version. Blocking: runs in workers.

Invariants:
    A handle is opened once, however many segments lie in it, and closed once.
    What is registered is mapped: who unmaps it unregisters it first. Where the device does not let
    go of it, it stays mapped as long as this process.
    Nothing is asked of CUDA before the first segment needs it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from weightbus.bus.cuda import CUDA_HANDLE_BYTES, CudaRuntime, host_device_uuids
from weightbus.bus.errors import CudaFailed, CudaUnavailable
from weightbus.consumers.errors import SegmentUnavailable
from weightbus.schemas.placement import CudaSegment
from weightbus.schemas.shared_memory import SHM_GENERATION_OFFSET

__all__ = ("Gpu", "OpenCuda", "OpenHandle", "check_cuda_segment", "gpu_of", "is_gpu", "name_of")

_logger = logging.getLogger(__name__)

OpenCuda = Callable[[], CudaRuntime]
"""As `weightbus.bus.cuda.open_cuda`."""

REGISTERED_BYTES: Final = 2**30
"""Registered at a time, up to the next address that is a multiple: the driver holds a lock for 40
ms meanwhile, which who serves may want, and it refuses 512 GiB at once. What a copy engine reads
lies in one registration: no copy crosses a multiple. Kernels read across."""

_CUDA: Final = "cuda"

_LEFT: Final[list[object]] = []
"""Mappings that a device did not let go of: their memory stays as long as this process."""


def is_gpu(device: str) -> bool:
    """Whether a device, as a worker names its own (`cpu`, `cuda:0`), reads memory of GPUs."""
    return device.partition(":")[0] == _CUDA


def gpu_of(device: str, cuda: OpenCuda) -> Gpu | None:
    """Of a worker's device; None: it is no GPU."""
    if not is_gpu(device):
        return None
    number = device.partition(":")[2] or "0"
    assert number.isdecimal(), f"a worker names its device cuda:<number>, not {device!r}"
    return Gpu(int(number), cuda)


def name_of(segment: CudaSegment) -> str:
    """For messages."""
    return f"{segment.handle.hex()[:16] or 'without handle'} on {segment.device_uuid}"


def check_cuda_segment(segment: CudaSegment, host_id: str, uuids: Collection[str]) -> None:
    """What can be said of a segment without opening it, and without CUDA.

    Args:
        uuids: of the GPUs of this host, `GPU-...` only; empty: not known.

    Raises:
        SegmentUnavailable
    """
    name = name_of(segment)
    if segment.host_id != host_id:
        found = f"on host {segment.host_id}"
        raise SegmentUnavailable(name, found, f"must be on this one, {host_id}")
    if len(segment.handle) != CUDA_HANDLE_BYTES:
        found = f"offered by a handle of {len(segment.handle)} bytes"
        raise SegmentUnavailable(name, found, f"must be one of {CUDA_HANDLE_BYTES}")
    if uuids and segment.device_uuid.startswith("GPU-") and segment.device_uuid not in uuids:
        raise SegmentUnavailable(name, "on no GPU of this host", f"must be on {_listed(uuids)}")


@dataclass
class OpenHandle:
    """Another process's allocation, mapped for this worker's device."""

    base: int
    """Address of its first byte."""
    size_bytes: int | None
    """As the driver says; None: it does not."""
    since: int
    """Number of the update that opened it."""
    used: int = 0
    """Number of the update that asked for it last."""
    read: int = 0
    """Number of the update that last found what it wanted in it, and may be reading it."""


class Gpu:
    """One device, as one cache of segments uses it. Not for several threads.

    Args:
        number: of the device in this process.
        uuids: of the GPUs of this host, also of those that this process was not given.
        registered_bytes: see `REGISTERED_BYTES`; whole pages.
    """

    def __init__(
        self,
        number: int,
        cuda: OpenCuda,
        uuids: Callable[[], Collection[str]] = host_device_uuids,
        registered_bytes: int = REGISTERED_BYTES,
    ) -> None:
        self.number = number
        self._registered_bytes = registered_bytes
        self._registered: dict[int, list[int]] = {}
        """Address of a mapping -> where its registrations begin."""
        self._open_cuda, self._uuids = cuda, uuids
        self._cuda: CudaRuntime | None = None
        self._handles: dict[bytes, OpenHandle] = {}
        self._read_only: bool | None = None
        """Whether mappings may be read-only; None: not asked yet."""

    # -- memory of GPUs

    def opened(self, segment: CudaSegment, update: int) -> OpenHandle:
        """The allocation of a segment that `check_cuda_segment` has passed.

        Raises:
            SegmentUnavailable: its GPU is not of this host, or the handle cannot be opened.
        """
        kept = self._handles.get(segment.handle)
        if kept is None:
            name = name_of(segment)
            cuda = self._runtime(name)
            self._check_device(cuda, segment)
            try:
                base = cuda.open_handle(self.number, segment.handle)
            except CudaFailed as error:
                limit = f"must be opened on device {self.number}, by another process than its own"
                raise SegmentUnavailable(name, f"not readable ({error})", limit) from error
            kept = self._handles[segment.handle] = OpenHandle(
                base, self._size_bytes(base), since=update
            )
        kept.used = update
        return kept

    def read(self, name: str, address: int, size_bytes: int) -> bytes:
        """A copy of few bytes of what is open.

        Raises:
            SegmentUnavailable: the device cannot read them (any more).
        """
        buffer = bytearray(size_bytes)
        self.read_into(name, address, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, address: int, buffer: memoryview) -> None:
        """As `read`, into the caller's memory.

        Raises:
            SegmentUnavailable
        """
        try:
            self._runtime(name).read_into(self.number, address, buffer)
        except CudaFailed as error:
            found = f"not readable ({error})"
            raise SegmentUnavailable(name, found, "must be readable while it is open") from error

    def generation(self, name: str, handle: OpenHandle) -> int:
        """The word in an allocation's header, now.

        Raises:
            SegmentUnavailable: as of `read`.
        """
        word = self.read(name, handle.base + SHM_GENERATION_OFFSET, 8)
        return int.from_bytes(word, "little")

    def close_stale(self, segment: CudaSegment, update: int) -> bool:
        """What an earlier update has opened does not hold the segment: close it, since the
        allocation may be another one now, whose handle is the same.

        Returns: False: it is not that: it was opened just now, or the update reads from it.
        """
        kept = self._handles.get(segment.handle)
        if kept is None or update in (kept.since, kept.read):
            return False
        self._close(segment.handle)
        return True

    def close_handles(self, used_before: int) -> None:
        """Close what no update of this number or later has used. Nothing on the device reads there.

        What cannot be closed is forgotten, with a warning: the driver closes it with the process.
        """
        for key, handle in list(self._handles.items()):
            if handle.used < used_before:
                self._close(key)

    # -- memory of this host

    def access(self, name: str) -> int:
        """With which rights a block must be opened to be registered: O_RDONLY if the device takes
        mappings that may only be read, else O_RDWR.

        Raises:
            SegmentUnavailable: there is no CUDA.
        """
        if self._read_only is None:
            cuda = self._runtime(name)
            try:
                self._read_only = cuda.can_register_read_only(self.number)
            except CudaFailed as error:
                _logger.warning("read-only mappings are not tried: %s", error)
                self._read_only = False
        return os.O_RDONLY if self._read_only else os.O_RDWR

    def register(self, name: str, address: int, size_bytes: int, *, read_only: bool) -> bool:
        """Let the device read a whole mapping at its host address. If that fails, none of it is.

        Returns: False: it refuses one that may only be read, and `access` says so from now on: the
            caller maps it again.

        Raises:
            SegmentUnavailable: names block, bytes and device.
        """
        cuda, done = self._runtime(name), list[int]()
        try:
            for first, count in self._cut(address, size_bytes):
                cuda.register(first, count, read_only=read_only, device=self.number)
                done.append(first)
        except CudaFailed as error:
            self._unregister(name, done)
            if read_only:
                _logger.info("blocks are mapped writable: %s", error)
                self._read_only = False
                return False
            found = f"{size_bytes:,} bytes that device {self.number} does not take ({error})"
            limit = "must be registered whole: host memory that can be locked, and not twice"
            raise SegmentUnavailable(name, found, limit) from error
        self._registered[address] = done
        return True

    def unregister(self, name: str, address: int, memory: object) -> bool:
        """Before it is unmapped; nothing on the device reads there any more.

        Args:
            memory: the mapping; kept, as long as this process, if the device does not let go of it.

        Returns: whether it may be unmapped.
        """
        if self._unregister(name, self._registered.pop(address)):
            return True
        _LEFT.append(memory)
        return False

    def _unregister(self, name: str, addresses: Sequence[int]) -> bool:
        """All of them, whatever becomes of one; whether none is left."""
        left = 0
        for address in addresses:
            try:
                self._runtime(name).unregister(address)
            except CudaFailed as error:
                _logger.warning("%s stays mapped: %s", name, error)
                left += 1
        return not left

    def _cut(self, address: int, size_bytes: int) -> Iterator[tuple[int, int]]:
        """The parts of some memory that are registered one by one."""
        first, end = address, address + size_bytes
        while first < end:
            border = (first // self._registered_bytes + 1) * self._registered_bytes
            yield first, min(border, end) - first
            first = border

    def _close(self, key: bytes) -> None:
        handle = self._handles.pop(key)
        assert self._cuda is not None, "it has opened the handle"
        try:
            self._cuda.close_handle(self.number, handle.base)
        except CudaFailed as error:
            _logger.warning("memory of another process stays open: %s", error)

    def _runtime(self, name: str) -> CudaRuntime:
        if self._cuda is None:
            try:
                self._cuda = self._open_cuda()
            except CudaUnavailable as error:
                limit = f"must be readable by device cuda:{self.number}"
                raise SegmentUnavailable(name, f"out of reach ({error})", limit) from error
        return self._cuda

    def _check_device(self, cuda: CudaRuntime, segment: CudaSegment) -> None:
        """Its GPU is of this host, be it one that this process was not given: CUDA maps those, too.

        Raises:
            SegmentUnavailable
        """
        try:
            if cuda.find_device(segment.device_uuid) is not None:
                return
            mine = {cuda.device_uuid(number) for number in range(cuda.device_count())}
        except CudaFailed as error:
            limit = "must be on a GPU of this host"
            raise SegmentUnavailable(name_of(segment), f"out of reach ({error})", limit) from error
        known = mine.union(self._uuids())
        if segment.device_uuid not in known:
            limit = f"must be on {_listed(known)}"
            raise SegmentUnavailable(name_of(segment), "on no GPU of this host", limit)

    def _size_bytes(self, base: int) -> int | None:
        """Of an allocation that was just opened; None: the driver does not tell."""
        assert self._cuda is not None
        try:
            return self._cuda.size_bytes(self.number, base)
        except CudaFailed as error:
            _logger.info("its header alone says how large an allocation is: %s", error)
            return None


def _listed(uuids: Collection[str]) -> str:
    return " or ".join(sorted(uuids)) or "one that the driver lists"
