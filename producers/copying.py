"""Copies a part's tensors into a block in host memory, whatever holds them.

`HostCopier` copies at once; `GpuCopier` queues on streams, and never waits for a device. No view of
a trainer's tensor is kept. What is published as another dtype is cast, and an adapter's product
added, in the copy: the trainer's tensors stay as they are, and one tensor at a time has a copy of
its own (none on the CPU, if it is only cast).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Protocol

import torch

from weightbus.producers.devices import Devices, Handover, Stream
from weightbus.producers.shards import Part, box_bytes, torch_dtype

__all__ = ("Copier", "GpuCopier", "HostCopier", "copy_shard")


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
        place.copy_(part.elements(number), non_blocking=non_blocking)
