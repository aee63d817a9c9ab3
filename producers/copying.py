"""Copies a part's tensors into a block in host memory, whatever holds them.

`HostCopier` copies at once; `GpuCopier` queues on streams, and never waits for a device. No view of
a trainer's tensor is kept. What is published as another dtype is cast, and an adapter's product
added, in the copy: the trainer's tensors stay as they are. What takes a temporary, a sum or what a
GPU casts for the host, is made in pieces of rows: that bounds it, and lets a CPU keep sums in its
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Final, Protocol

import torch

from weightbus.producers.devices import Devices, Handover, Stream
from weightbus.producers.shards import Part, box_bytes, torch_dtype

__all__ = ("Copier", "GpuCopier", "HostCopier", "copy_shard")

CPU_PIECE_BYTES: Final = 2**20
"""Of a temporary: half the time of one that is so large that it is new memory each time."""

GPU_PIECE_BYTES: Final = 64 * 2**20


class Copier(Protocol):
    """Copies a run of shards at a time. For one thread."""

    def copy(self, data: torch.Tensor, part: Part, begin: int, end: int) -> None:
        """Copy shards `begin` to `end` to their places in `data`, or see to it that they will be.

        Args:
            data: a slot's bytes, in host memory.
        """

    def mark(self) -> Callable[[], None]:
        """Returns what waits until all that was given to be copied by now is; for any thread."""

    def precede(self, stream: Stream) -> None:
        """What is queued there from now on comes after all that was given to be copied by now."""


class HostCopier:
    """One `copy_` per tensor, of any strides, on any device; done when it returns."""

    def __init__(self, part: Part) -> None:
        """Waits for the devices that hold its tensors."""
        for device in part.devices:
            if device.type != "cpu":
                torch.get_device_module(device).synchronize(device)

    def copy(self, data: torch.Tensor, part: Part, begin: int, end: int) -> None:
        for number in range(begin, end):
            copy_shard(data, part, number)

    def mark(self) -> Callable[[], None]:
        return lambda: None

    def precede(self, stream: Stream) -> None:
        """It is copied already."""


class GpuCopier:
    """Each GPU's tensors on a stream of its own, after the trainer's work; others at once.

    A launch per tensor costs less than the link takes for it, and they overlap.
    """

    def __init__(self, devices: Devices, streams: Mapping[int, Stream], handover: Handover) -> None:
        """`streams`: for every GPU that holds sources, where to queue."""
        self._devices, self._streams = devices, streams
        for number, stream in streams.items():
            stream.follow(handover.streams[number])

    def copy(self, data: torch.Tensor, part: Part, begin: int, end: int) -> None:
        by_device: dict[int | None, list[int]] = {}
        for number in range(begin, end):
            device = self._devices.number_of(part.sources[number])
            by_device.setdefault(device, []).append(number)
        for device, numbers in by_device.items():
            with nullcontext() if device is None else self._streams[device].use():
                for number in numbers:
                    copy_shard(data, part, number, non_blocking=device is not None)

    def mark(self) -> Callable[[], None]:
        waits = [stream.mark() for stream in self._streams.values()]

        def wait() -> None:
            for wait_for_one in waits:
                wait_for_one()

        return wait

    def precede(self, stream: Stream) -> None:
        for copies in self._streams.values():
            stream.follow(copies)


def copy_shard(data: torch.Tensor, part: Part, number: int, *, non_blocking: bool = False) -> None:
    """Copy one shard to its place in a slot's bytes, on the current stream of its device."""
    shard = part.layout.shards[number]
    size_bytes = box_bytes(part.layout, shard)
    place = data[shard.offset_bytes : shard.offset_bytes + size_bytes]
    with torch.no_grad():
        place = place.view(torch_dtype(part.layout, shard)).view(shard.sizes)
        source, delta = part.sources[number], part.deltas.get(number)
        is_cast_on_gpu = source.dtype != place.dtype and source.device != place.device
        if delta is None and not (is_cast_on_gpu and source.ndim):
            place.copy_(source, non_blocking=non_blocking)
            return
        piece_bytes = CPU_PIECE_BYTES if source.device.type == "cpu" else GPU_PIECE_BYTES
        rows = max(piece_bytes * len(source) // source.nbytes, 1)
        for begin in range(0, len(source), rows):
            end = min(begin + rows, len(source))
            piece = source[begin:end] if delta is None else delta.add_to(source, begin, end)
            place[begin:end].copy_(piece, non_blocking=non_blocking)
            del piece  # before there is another
