"""GPUs that are host memory: streams do their work at once, and note in which order it came."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from tests.fake_cuda import FakeCuda
from weightbus.bus.cuda import CudaRuntime
from weightbus.bus.digest import digest_box
from weightbus.bus.errors import CudaFailed, CudaTimeout, CudaUnavailable
from weightbus.producers.copying import copy_shard
from weightbus.producers.devices import Device, Devices, Digest, SlotCopy, Stream
from weightbus.producers.digests import Sums
from weightbus.producers.shards import Part
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout

__all__ = ("FakeDevice", "FakeDevices", "FakeStream")

NO_CUDA = CudaUnavailable("there is no driver", "get one")


class FakeStream(Stream):
    def __init__(self, name: str, device: FakeDevice) -> None:
        self.name, self._device = name, device

    @contextmanager
    def use(self) -> Iterator[None]:
        before, self._device.current = self._device.current, self
        try:
            yield
        finally:
            self._device.current = before

    def follow(self, other: Stream) -> None:
        assert isinstance(other, FakeStream)
        self._device.note(f"{self.name} follows {other.name}")

    def mark(self) -> Callable[[], None]:
        def wait() -> None:
            self._device.note(f"waited for {self.name}")
            if self._device.late:
                raise CudaTimeout("copying", self.name, 300.0)
            if self._device.broken:
                raise CudaFailed("copying", self.name, "CUDA_ERROR_ECC_UNCORRECTABLE")

        return wait


class FakeDevice(Device):
    """Tensors in host memory stand for those that it holds."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.trainer = FakeStream("trainer", self)
        self.current = self.trainer
        self.notes: list[str] = []
        self.broken = False
        """Whatever is waited for has failed."""
        self.late = False
        """Whatever is waited for goes on."""
        self.has_compiler = True
        self.cached_bytes = 0
        self.before_copy: Callable[[], None] = lambda: None
        self._streams = 0

    def note(self, what: str) -> None:
        self.notes.append(what)

    def current_stream(self) -> Stream:
        return self.current

    def new_stream(self) -> Stream:
        self._streams += 1
        return FakeStream(f"stream {self._streams}", self)

    def bytes_at(self, address: int, size_bytes: int) -> torch.Tensor:
        memory = (ctypes.c_char * size_bytes).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def check_kernels(self) -> None:
        if not self.has_compiler:
            raise CudaUnavailable("the package triton is not installed", "pip install triton")

    def open_copy(self, layout: Layout) -> SlotCopy:
        return _Copy(layout, self)

    def open_digest(self, layout: Layout) -> Digest:
        return _Digest(layout, self)

    def give_back_unused(self) -> None:
        self.cached_bytes = 0


class FakeDevices(Devices):
    """Everything lies on GPU 0, but for what `elsewhere` tells."""

    def __init__(self, cuda: FakeCuda | None = None) -> None:
        self.cuda = cuda or FakeCuda()
        self.has_driver = True
        self.elsewhere: dict[int, int | None] = {}
        """`data_ptr` of a tensor -> the GPU that holds it; None: none does."""
        self.fakes = [FakeDevice(number) for number in range(self.cuda.device_count())]
        super().__init__(self._open_cuda)

    def number_of(self, tensor: torch.Tensor) -> int | None:
        return self.elsewhere.get(tensor.data_ptr(), 0)

    def numbers_of(self, part: Part) -> tuple[int, ...]:
        numbers = {self.number_of(source) for source in part.sources}
        return tuple(sorted(number for number in numbers if number is not None))

    def _open_cuda(self) -> CudaRuntime:
        if not self.has_driver:
            raise NO_CUDA
        return self.cuda

    def _open(self, number: int) -> Device:
        return self.fakes[number]


class _Copy:
    def __init__(self, layout: Layout, device: FakeDevice) -> None:
        self._layout, self._device = layout, device
        self._prepared: Part | None = None

    def prepare(self, part: Part) -> None:
        assert part.layout == self._layout
        assert self._device.current is not self._device.trainer
        self._prepared = part

    def start(self, data: torch.Tensor, part: Part) -> None:
        assert part is self._prepared
        self._device.before_copy()
        self._device.note(f"copied on {self._device.current.name}")
        for number in range(len(self._layout.shards)):
            copy_shard(data, part, number)


class _Digest:
    def __init__(self, layout: Layout, device: FakeDevice) -> None:
        self._layout, self._device = layout, device
        self._sums: dict[int, int] = {}

    def start(self, address: int, begin: int = 0, end: int | None = None) -> None:
        self._device.note(f"digested on {self._device.current.name}")
        written = self._device.bytes_at(address, self._layout.segments[0].size_bytes).numpy()
        for number, shard in [*enumerate(self._layout.shards)][begin:end]:
            spec = self._layout.tensors[shard.tensor]
            itemsize = DTYPE_BYTES[spec.dtype]
            last = shard.offset_bytes + itemsize * int(np.prod(shard.sizes, dtype=int))
            box = written[shard.offset_bytes : last]
            self._sums[number] = digest_box(box, spec.shape, itemsize, shard.starts, shard.sizes)

    def finish(self) -> Sums:
        sums = [self._sums.pop(number) for number in range(len(self._layout.shards))]
        return np.array(sums, dtype=np.uint64)
