"""How a part gets into a slot: which kinds of memory the slot lies in, and who copies and digests.

`Writers.choose` decides by what was asked for and by where the tensors lie; a `Writer` does it.
Blocking; runs in worker threads. The trainer goes on as soon as its tensors are copied:

- into host memory from host memory: when the last one is. Where there are few cores, digesting
  begins then: beside the copy it would take its cores, and both would be slower;
- into host memory from GPUs: when the last one is, on streams of our own. Where all GPU tensors of
  a part lie on one, that GPU digests the slot, else threads of the CPU do;
- into GPU memory: at once. The copies are queued after the trainer's work so far, and before all
  that it queues next. The digest, and the copy for other readers, are taken of the slot then.

Nothing of ours touches a trainer's tensor or a slot after a writer has ended, unless it raises
`CudaTimeout`: the device may go on then, and the slot's blocks are left to it.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final, Literal

import torch

from weightbus.bus.blocks import SharedBlock
from weightbus.bus.cuda import CudaBlock
from weightbus.bus.errors import CudaFailed, CudaTimeout, CudaUnavailable
from weightbus.producers.copying import Copier, GpuCopier
from weightbus.producers.devices import (
    Device,
    Devices,
    Digest,
    Handover,
    SlotCopy,
    Stream,
    wait_after,
)
from weightbus.producers.digesting import DeviceDigesters, Digester, ThreadDigester
from weightbus.producers.digests import Sums
from weightbus.producers.errors import DeviceMemoryFull, SlotsUnsuitable
from weightbus.producers.memory import DeviceMemory, HostMemory, Memory, Owner
from weightbus.producers.shards import Part
from weightbus.producers.slots import Slot
from weightbus.producers.writing import write_part
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.layout import Layout

__all__ = ("SlotsIn", "Writer", "Writers")

_logger = logging.getLogger(__name__)

SlotsIn = Literal["host", "device", "both", "auto"]

CORES_PER_THREAD: Final = 2
"""Threads digest beside copies from host memory where this process may use as many cores for each
of them. On two cores, 268 MB were copied in 0.46 s, and digested by 4 threads after 0.66 s, one
after the other; beside each other in 0.80 s and 0.91 s."""

CHUNK_BYTES: Final = 64 * 2**20
"""Of one copy from a GPU to the host: the trainer's own small copies get in between."""


class Writer(ABC):
    """Writes parts into slots of certain kinds of memory."""

    kinds: tuple[Memory, ...]
    """The nearest to readers first."""

    @abstractmethod
    def write(
        self, part: Part, slot: Slot, handover: Handover, check_cancelled: Callable[[], None]
    ) -> Sums:
        """Copy and digest every shard; returns the partial digest of each, in layout order.

        The slot's blocks are whole when it returns; when it raises, their generations stay odd.
        `handover.copied` is called once the trainer may go on, as it may when this has ended.
        What `check_cancelled` raises is passed on.

        Raises:
            CudaFailed: a device failed.
            CudaTimeout: it may go on; the slot has no blocks any more.
        """


class Writers:
    """The writers of one publisher."""

    def __init__(
        self, slots: SlotsIn, owner: Owner, host: HostMemory, devices: Devices, threads: int
    ) -> None:
        self._slots, self._owner, self._host, self._devices = slots, owner, host, devices
        self._host_writer = _HostWriter(host, devices, threads)
        self._device_writers: dict[int, _DeviceWriter] = {}
        self._on_device = slots != "host"

    def choose(self, part: Part) -> Writer:
        """Who writes a part.

        Raises:
            SlotsUnsuitable: its tensors do not lie on one GPU, and that was asked for.
            CudaUnavailable: there is no driver, or no compiler, and that was asked for.
            CudaFailed: the GPU refuses streams, or did not get done before, and that was asked for.
        """
        if not self._on_device or not part.sources:
            return self._host_writer
        numbers = self._devices.numbers_of(part)
        if not numbers and self._slots == "auto":
            return self._host_writer
        try:
            if not numbers:
                raise SlotsUnsuitable(self._slots, "no tensor lies on a GPU: say slots='host'")
            if len(numbers) > 1:
                gpus = ", ".join(map(str, numbers))
                raise SlotsUnsuitable(
                    self._slots, f"tensors of one part lie on GPUs {gpus}: one rank for each GPU"
                )
            return self._writer_of(numbers[0])
        except (SlotsUnsuitable, CudaUnavailable, CudaFailed) as error:
            if self.falls_back(error):
                return self._host_writer
            raise

    def falls_back(self, error: WeightBusError) -> bool:
        """Whether slots lie in host memory from now on, since GPU memory is not to be had."""
        wanted = isinstance(
            error, SlotsUnsuitable | CudaUnavailable | CudaFailed | DeviceMemoryFull
        )
        if self._slots != "auto" or not self._on_device or not wanted:
            return False
        _logger.warning("slots lie in host memory, not on the GPU: %s", error)
        self._on_device = False
        return True

    def _writer_of(self, number: int) -> Writer:
        if number not in self._device_writers:
            runtime = self._devices.runtime()
            device = self._devices.device(number)
            device.check_kernels()
            memory = DeviceMemory(self._owner, runtime, device)
            for_others = self._slots == "both" or (self._slots == "auto" and self._host.is_remote)
            host = self._host if for_others else None
            self._device_writers[number] = _DeviceWriter(memory, device, host, self._devices)
        writer = self._device_writers[number]
        if (late := writer.late) is not None:
            raise CudaTimeout(late.what, late.value, late.timeout_s)
        return writer


class _HostWriter(Writer):
    def __init__(self, host: HostMemory, devices: Devices, threads: int) -> None:
        self.kinds = (host,)
        self._host, self._devices, self._threads = host, devices, threads
        self._streams: dict[int, Stream] = {}
        self._digesters = DeviceDigesters(devices)

    def write(
        self, part: Part, slot: Slot, handover: Handover, check_cancelled: Callable[[], None]
    ) -> Sums:
        block = slot.blocks[self._host]
        assert isinstance(block, SharedBlock)
        numbers = self._devices.numbers_of(part)
        copier: Copier | None = None
        digester: Digester | None = None
        if numbers:
            pinned = _pin(self._host, block, self._devices, numbers[0])
            copier = GpuCopier(self._devices, self._streams_of(numbers), handover)
            if pinned and len(numbers) == 1:
                digester = self._digesters.open(numbers[0], part.layout, block.address)
        data = block.begin_write()
        beside = bool(numbers) or _has_cores_for(self._threads)
        digester = digester or ThreadDigester(part.layout, data, self._threads)
        try:
            sums = write_part(
                part, data, digester, check_cancelled, copier, handover.copied, beside=beside
            )
        except CudaTimeout:
            slot.leave()
            for number in numbers:
                self._digesters.leave(number)
            raise
        block.end_write()
        return sums

    def _streams_of(self, numbers: Sequence[int]) -> dict[int, Stream]:
        for number in numbers:
            if number not in self._streams:
                self._streams[number] = self._devices.device(number).new_stream()
        return {number: self._streams[number] for number in numbers}


class _DeviceWriter(Writer):
    """Of one GPU; with `host`, into host memory, too."""

    def __init__(
        self, memory: DeviceMemory, device: Device, host: HostMemory | None, devices: Devices
    ) -> None:
        self.kinds = (memory,) if host is None else (memory, host)
        self._memory, self._device, self._host, self._devices = memory, device, host, devices
        self._stream = device.new_stream()
        self._host_stream = device.new_stream()
        self.late: CudaTimeout | None = None
        """What it has given the GPU was not done in time: it writes no more."""
        self._copy: tuple[Layout, SlotCopy] | None = None
        self._digest: tuple[Layout, Digest] | None = None

    def write(
        self, part: Part, slot: Slot, handover: Handover, check_cancelled: Callable[[], None]
    ) -> Sums:
        block = slot.blocks[self._memory]
        assert isinstance(block, CudaBlock)
        with self._stream.use():  # before it waits for the trainer's work
            copy = self._copy_of(part.layout)
            copy.prepare(part)
        address = block.begin_write()
        data = self._device.bytes_at(address, block.size_bytes)
        trainer = handover.streams[self._device.number]
        try:
            check_cancelled()
            self._stream.follow(trainer)
            with self._stream.use():
                copy.start(data, part)
            trainer.follow(self._stream)
            handover.copied()
            if self._host is not None:
                self._copy_to_host(data, slot)
            with self._stream.use():
                digest = self._digest_of(part.layout)
                digest.start(address)
            self._stream.wait()
            with self._stream.use():
                sums = digest.finish()
            self._host_stream.wait()
            check_cancelled()
        except BaseException as error:
            try:
                wait_after(error, self._stream.mark, self._host_stream.mark)
            except CudaTimeout as late:
                self.late = late
                slot.leave()
                raise
            raise
        for written in slot.blocks.values():
            written.end_write()
        return sums

    def _copy_to_host(self, data: torch.Tensor, slot: Slot) -> None:
        """Queue it; the slots have the same offsets."""
        assert self._host is not None
        block = slot.blocks[self._host]
        assert isinstance(block, SharedBlock)
        _pin(self._host, block, self._devices, self._device.number)
        target = torch.frombuffer(block.begin_write(), dtype=torch.uint8)
        self._host_stream.follow(self._stream)
        with self._host_stream.use():
            for begin in range(0, len(data), CHUNK_BYTES):
                chunk = slice(begin, begin + CHUNK_BYTES)
                target[chunk].copy_(data[chunk], non_blocking=True)

    def _copy_of(self, layout: Layout) -> SlotCopy:
        if self._copy is None or self._copy[0] != layout:
            self._copy = layout, self._device.open_copy(layout)
        return self._copy[1]

    def _digest_of(self, layout: Layout) -> Digest:
        if self._digest is None or self._digest[0] != layout:
            self._digest = layout, self._device.open_digest(layout)
        return self._digest[1]


def _has_cores_for(threads: int) -> bool:
    return len(os.sched_getaffinity(0)) >= CORES_PER_THREAD * threads


def _pin(host: HostMemory, block: SharedBlock, devices: Devices, number: int) -> bool:
    """Let a GPU copy into a block at full speed, and read it, if there is a driver that we can
    speak to; returns whether it does."""
    try:
        runtime = devices.runtime()
    except CudaUnavailable as error:
        host.cannot_pin(error)
        return False
    return host.pin(block, runtime, number)
