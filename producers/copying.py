"""Copies a part's tensors into a block in host memory, whatever holds them.

`HostCopier` copies at once; `GpuCopier` queues on streams, and never waits for a device. No view of
a trainer's tensor is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch

from weightbus.producers.devices import Devices, Handover, Stream
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, ShardSpec

__all__ = ("Copier", "GpuCopier", "HostCopier", "box_bytes", "place_of")


class Copier(Protocol):
    """Copies a run of shards at a time. For one thread."""

    def copy(self, places: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Copy each source to its place, or see to it that it will be."""

    def mark(self) -> Callable[[], None]:
        """Returns what waits until all that was given to be copied by now is; for any thread."""

    def precede(self, stream: Stream) -> None:
        """What is queued there from now on comes after all that was given to be copied by now."""


class HostCopier:
    """One `copy_` per tensor, of any strides, on any device; done when it returns."""

    def __init__(self, sources: Sequence[torch.Tensor]) -> None:
        """Waits for the devices that hold sources."""
        for device in {source.device for source in sources if source.device.type != "cpu"}:
            torch.get_device_module(device).synchronize(device)

    def copy(self, places: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for place, source in zip(places, sources, strict=True):
                place.copy_(source)

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

    def copy(self, places: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        by_device: dict[int | None, list[int]] = {}
        for number, source in enumerate(sources):
            by_device.setdefault(self._devices.number_of(source), []).append(number)
        for device, numbers in by_device.items():
            with nullcontext() if device is None else self._streams[device].use(), torch.no_grad():
                for number in numbers:
                    queued = device is not None
                    places[number].copy_(sources[number], non_blocking=queued)

    def mark(self) -> Callable[[], None]:
        waits = [stream.mark() for stream in self._streams.values()]

        def wait() -> None:
            for wait_for_one in waits:
                wait_for_one()

        return wait

    def precede(self, stream: Stream) -> None:
        for copies in self._streams.values():
            stream.follow(copies)


def place_of(data: torch.Tensor, shard: ShardSpec, source: torch.Tensor) -> torch.Tensor:
    """Where a shard lies in a block's bytes: a view of its source's dtype and shape."""
    size_bytes = source.numel() * source.element_size()
    place = data[shard.offset_bytes : shard.offset_bytes + size_bytes]
    return place.view(source.dtype).view(source.shape)


def box_bytes(layout: Layout, shard: ShardSpec) -> int:
    """Size of a shard."""
    size_bytes = DTYPE_BYTES[layout.tensors[shard.tensor].dtype]
    for extent in shard.sizes:
        size_bytes *= extent
    return size_bytes
