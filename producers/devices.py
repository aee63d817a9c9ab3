"""GPUs as a publisher uses them: streams, views of device memory, digests. Edge adapter of torch.

Owns nothing but the streams it makes. `Devices` is put together once per publisher; tests give it
another one, whose devices are host memory. Which stream a trainer works on is known to its own
thread alone: `Devices.hand_over` is called there.

What torch, Triton and the compilers that it calls raise becomes `CudaFailed`; what a device does
not get done in time, `CudaTimeout`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch

from weightbus.bus.cuda import CudaRuntime, open_cuda
from weightbus.bus.errors import CudaFailed, CudaTimeout, CudaUnavailable
from weightbus.producers.digests import Sums
from weightbus.producers.shards import ALIGNMENT_BYTES, Part, plan_part
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout

__all__ = (
    "Device",
    "Devices",
    "Digest",
    "Handover",
    "SlotCopy",
    "Stream",
    "try_kernels",
    "wait_after",
)

WORK_S: Final = 300.0
"""The longest that a device may take for what a publisher gives it: it waits for the trainer's own
work first."""

FIRST_PAUSE_S: Final = 20e-6
LONGEST_PAUSE_S: Final = 1e-3
"""Between two looks at a stream: each pause is twice the one before, up to this."""


class Stream(ABC):
    """Work of one device that is done in order."""

    @abstractmethod
    def use(self) -> AbstractContextManager[None]:
        """Within it, what this thread gives torch to do is queued here."""

    @abstractmethod
    def follow(self, other: Stream) -> None:
        """What is queued here from now on comes after all that is queued in `other` by now."""

    @abstractmethod
    def mark(self) -> Callable[[], None]:
        """Returns what waits until all that is queued here by now is done; for any thread.

        It raises:
            CudaFailed: something that was queued has failed.
            CudaTimeout: it was not done within `WORK_S`.
        """

    def wait(self) -> None:
        """Wait until all that is queued here is done. Raises what `mark` names."""
        self.mark()()


class Digest(Protocol):
    """Digests the shards of one layout by a device; `weightbus.bus.digest_gpu.GpuDigest`."""

    def start(self, address: int, begin: int = 0, end: int | None = None) -> None:
        """Queue shards `begin` to `end` (None: the last) on the current stream.

        Args:
            address: of the slot's bytes: of this device, or of the host and registered with CUDA.
        """

    def finish(self) -> Sums:
        """The partial digest of each shard, all being started. Waits for the current stream."""


class SlotCopy(Protocol):
    """Copies parts of one layout into slots of one device; `producers.gpu_copy.GpuCopy`."""

    def prepare(self, part: Part) -> None:
        """Learn where its tensors are. May wait for the current stream."""

    def start(self, data: torch.Tensor, part: Part) -> None:
        """Queue the copies of the part that was prepared on the current stream.

        Args:
            data: the slot's bytes.
        """


class Device(ABC):
    """One GPU."""

    number: int
    """As torch and CUDA count them in this process."""

    @abstractmethod
    def current_stream(self) -> Stream:
        """The one that this thread's work is queued on."""

    @abstractmethod
    def new_stream(self) -> Stream:
        """One of our own."""

    @abstractmethod
    def bytes_at(self, address: int, size_bytes: int) -> torch.Tensor:
        """Device memory as bytes, one dimension. Owns nothing: drop it before the memory goes."""

    @abstractmethod
    def check_kernels(self) -> None:
        """
        Raises:
            CudaUnavailable: there is no compiler for the kernels below, or they do not run.
        """

    @abstractmethod
    def open_copy(self, layout: Layout) -> SlotCopy:
        """For parts of this layout, which have one segment. May wait for the current stream."""

    @abstractmethod
    def open_digest(self, layout: Layout) -> Digest:
        """As `open_copy`."""

    @abstractmethod
    def give_back_unused(self) -> None:
        """Let go of the memory that torch keeps, but does not use."""


@dataclass(frozen=True)
class Handover:
    """What a trainer says as it gives a part to be published."""

    streams: Mapping[int, Stream] = field(default_factory=dict)
    """For every GPU that holds tensors of the part: where the trainer's work on them is queued."""
    copied: Callable[[], None] = lambda: None
    """To be called from the writing thread once the trainer may go on: what it queues on `streams`
    may change the tensors then."""
    goes_on: bool = False
    """Whether the trainer does; else it waits until all is done."""
    begun_s: float = field(default_factory=time.perf_counter)
    """When the trainer handed it over, by `time.perf_counter`."""


class Devices:
    """The GPUs of this process."""

    def __init__(self, open_runtime: Callable[[], CudaRuntime] = open_cuda) -> None:
        self._open_runtime = open_runtime
        self._devices: dict[int, Device] = {}

    def runtime(self) -> CudaRuntime:
        """
        Raises:
            CudaUnavailable
        """
        return self._open_runtime()

    def device(self, number: int) -> Device:
        """A device that holds tensors."""
        if number not in self._devices:
            self._devices[number] = self._open(number)
        return self._devices[number]

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """The GPU that holds a tensor; None: none of CUDA's does."""
        return tensor.device.index if tensor.device.type == "cuda" else None

    def numbers_of(self, part: Part) -> tuple[int, ...]:
        """All GPUs that hold tensors of a part, in order."""
        return tuple(sorted(device.index for device in part.devices if device.type == "cuda"))

    def hand_over(self, part: Part, copied: Callable[[], None] | None = None) -> Handover:
        """To be called in the trainer's thread, for each version: `Part.prepare` is called here."""
        begun_s = time.perf_counter()
        part.prepare()
        streams = {number: self.device(number).current_stream() for number in self.numbers_of(part)}
        if copied is None:
            return Handover(streams, begun_s=begun_s)
        return Handover(streams, copied, goes_on=True, begun_s=begun_s)

    def _open(self, number: int) -> Device:
        return _CudaDevice(number)


def wait_after(error: BaseException, *marks: Callable[[], Callable[[], None]]) -> None:
    """After an error: wait for what is queued, `Stream.mark` being among `marks`, unless it failed.

    Raises:
        CudaTimeout: it goes on, as `error` may have said.
    """
    if isinstance(error, CudaTimeout):
        raise error
    for mark in marks:
        try:
            mark()()
        except CudaTimeout:
            raise
        except CudaFailed:
            continue  # of two errors the first


def try_kernels(device: Device, place: torch.device) -> None:
    """Copy and digest a few bytes.

    Args:
        place: the device, as torch calls it.

    Raises:
        CudaUnavailable: they cannot be compiled, or do not run.
    """
    try:
        stream = device.new_stream()
        with stream.use():
            tensor = torch.zeros(ALIGNMENT_BYTES, dtype=torch.uint8, device=place)
            slot = torch.zeros_like(tensor)
            part = plan_part({"w": tensor})
            copy = device.open_copy(part.layout)
            copy.prepare(part)
            copy.start(slot, part)
            device.open_digest(part.layout).start(slot.data_ptr())
        stream.wait()
    except CudaFailed as error:
        remedy = "see that Triton finds a C compiler, or publish with slots='host'"
        raise CudaUnavailable(f"the kernels do not run: {error}", remedy) from error


class _CudaDevice(Device):
    def __init__(self, number: int) -> None:
        self.number = number
        self._device = torch.device("cuda", number)

    def current_stream(self) -> Stream:
        return _CudaStream(torch.cuda.current_stream(self._device))

    def new_stream(self) -> Stream:
        with _mapped("cuStreamCreate", f"device {self.number}"):
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            return _CudaStream(stream)

    def bytes_at(self, address: int, size_bytes: int) -> torch.Tensor:
        with _mapped("viewing memory", f"{size_bytes:,} bytes at {address:#x}"):
            return torch.as_tensor(_DeviceBytes(address, size_bytes), device=self._device)

    def check_kernels(self) -> None:
        if importlib.util.find_spec("triton") is None:
            raise CudaUnavailable(
                "the package triton, which compiles the kernels, is not installed",
                "pip install triton, or publish with slots='host'",
            )
        try_kernels(self, self._device)

    def open_copy(self, layout: Layout) -> SlotCopy:
        from weightbus.producers.gpu_copy import GpuCopy  # it needs Triton

        with _mapped("copying tables", f"to device {self.number}"):
            return GpuCopy(layout, self._device)

    def open_digest(self, layout: Layout) -> Digest:
        from weightbus.bus.digest_gpu import Box, GpuDigest  # it needs Triton

        boxes = []
        for shard in layout.shards:
            spec = layout.tensors[shard.tensor]
            size = DTYPE_BYTES[spec.dtype]
            boxes.append(Box(shard.offset_bytes, spec.shape, size, shard.starts, shard.sizes))
        with _mapped("copying tables", f"to device {self.number}"):
            return GpuDigest(boxes, self._device)

    def give_back_unused(self) -> None:
        torch.cuda.empty_cache()


class _CudaStream(Stream):
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._name = f"stream {stream.cuda_stream:#x} of device {stream.device_index}"

    @contextmanager
    def use(self) -> Iterator[None]:
        with _mapped("queueing work", self._name), torch.cuda.stream(self.stream):
            yield

    def follow(self, other: Stream) -> None:
        assert isinstance(other, _CudaStream)
        with _mapped("waiting for another stream", self._name):
            self.stream.wait_stream(other.stream)

    def mark(self) -> Callable[[], None]:
        with _mapped("recording an event", self._name):
            event = self.stream.record_event()

        def wait() -> None:
            end_s = time.monotonic() + WORK_S
            pause_s = FIRST_PAUSE_S
            with _mapped("copying or digesting", self._name):
                while not event.query():
                    if time.monotonic() >= end_s:
                        raise CudaTimeout("copying or digesting", self._name, WORK_S)
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

        return wait


class _DeviceBytes:
    """Device memory, in the words of `numba`'s CUDA array interface, which torch reads."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


@contextmanager
def _mapped(what: str, value: str) -> Iterator[None]:
    """What is not ours to mend: see `_is_foreign`."""
    try:
        yield
    except Exception as error:
        if not _is_foreign(error):
            raise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CudaFailed(what, value, reason) from error


def _is_foreign(error: Exception) -> bool:
    """Whether torch (`RuntimeError`s), Triton, or the system under their compilers raised it."""
    if isinstance(error, RuntimeError | OSError | subprocess.SubprocessError):
        return True
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & {"torch", "triton"})
