"""A GPU as torch sees it: one stream, memory by address, and errors that are ours.

Owns a stream, and what it asked of the driver until the last tensor of it is gone. Work is queued
inside `work`, and all of it is done when `work` ends, also by an error: only then may the memory
that it touches go away.
"""

from __future__ import annotations

import importlib
import logging
import subprocess
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from weightbus.bus.cuda import CudaRuntime, open_cuda
from weightbus.bus.errors import CudaFailed, CudaUnavailable

__all__ = ("Accelerator", "CudaAccelerator")

_POLL_S: Final = 20e-6
"""Between two looks at the device: short beside an update, and other threads run meanwhile."""

_PROGRAMS_PER_PROCESSOR: Final = 8
"""Programs of a kernel that saturate what they read from. On an H200, digested: from the host 50
GB/s with 1 as with 8, from its own memory 937 with 4 and 960 with 8, read back 1143
(`benchmarks/gather.py`)."""

_DRIVER_BYTES: Final = 2**20
"""Memory of this size and more is asked of the driver, which gives multiples of 2 MiB: torch's
allocator would take 20 MiB at a time of what is smaller than 10, and keep it."""

_logger = logging.getLogger(__name__)


class Accelerator(ABC):
    """What the executor needs of a device. Not for several threads."""

    device: torch.device

    @abstractmethod
    def work(self, what: str) -> AbstractContextManager[None]:
        """Work is queued within, in order; it ends, or raises, once nothing of it runs any more.

        Raises:
            CudaFailed: something could not be queued, or failed; `what` says which work.
        """

    @abstractmethod
    def memory(self, address: int, size_bytes: int) -> torch.Tensor:
        """[size_bytes] of uint8: the device's memory from an address on, not a copy."""

    @abstractmethod
    def downloaded(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in main memory, which is there once `work` has ended."""

    @property
    @abstractmethod
    def programs(self) -> int:
        """How many programs of a kernel read at the speed of the link, wherever that leads."""

    def kernels(self) -> ModuleType:
        """What is written in Triton, which is loaded when it is first asked for."""
        return importlib.import_module("weightbus.consumers.reload.kernels")

    def uploaded(self, integers: npt.NDArray[np.int64]) -> torch.Tensor:
        """A copy on the device; `integers` may change at once. Also outside of `work`.

        Raises:
            CudaFailed: the device has no room for it.
        """
        data = torch.from_numpy(np.ascontiguousarray(integers))
        return self.allocated(data.nbytes).view(data.dtype).view(data.shape).copy_(data)

    def allocated(self, size_bytes: int) -> torch.Tensor:
        """[size_bytes] of uint8: new memory of the device, as long as the tensor is there.

        Raises:
            CudaFailed: the device has no room for it.
        """
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)


class CudaAccelerator(Accelerator):
    """An NVIDIA GPU, by its torch device; needs Triton.

    Raises:
        CudaFailed: torch cannot use the device.
    """

    def __init__(self, device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise CudaFailed(
                "a stream", str(device), "torch finds no GPU, or is built without CUDA"
            )
        with _as_ours("a stream", device):
            self.device = torch.empty(0, device=device).device  # with its index
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._processors = torch.cuda.get_device_properties(self.device).multi_processor_count

    @contextmanager
    def work(self, what: str) -> Iterator[None]:
        with _as_ours(what, self.device), torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                try:
                    yield
                finally:
                    self._wait()

    def uploaded(self, integers: npt.NDArray[np.int64]) -> torch.Tensor:
        with (
            _as_ours(f"{integers.nbytes:,} bytes of a table", self.device),
            torch.cuda.device(self.device),
            torch.cuda.stream(self._stream),  # who serves has others
        ):
            return super().uploaded(integers)

    def allocated(self, size_bytes: int) -> torch.Tensor:
        if size_bytes >= _DRIVER_BYTES:
            try:
                memory = _Owned(open_cuda(), self.device.index, size_bytes)
                return torch.as_tensor(memory, device=self.device)
            except (CudaFailed, CudaUnavailable) as error:
                _logger.info("torch is asked for %d bytes: %s", size_bytes, error)
        with _as_ours(f"{size_bytes:,} bytes", self.device):
            return super().allocated(size_bytes)  # torch gives up first what it only keeps

    def memory(self, address: int, size_bytes: int) -> torch.Tensor:
        return torch.as_tensor(_Raw(address, size_bytes), device=self.device)

    def downloaded(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)

    @property
    def programs(self) -> int:
        return self._processors * _PROGRAMS_PER_PROCESSOR

    def _wait(self) -> None:
        """Until the stream is done; other threads run meanwhile."""
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        while not event.query():
            time.sleep(_POLL_S)


class _Raw:
    """Device memory, as torch takes it (CUDA array interface, version 2)."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


class _Owned(_Raw):
    """Memory that is freed with the last tensor that shows it: torch keeps this as long. Freeing
    waits for the device."""

    def __init__(self, cuda: CudaRuntime, device: int, size_bytes: int) -> None:
        address = cuda.allocate(device, size_bytes)
        super().__init__(address, size_bytes)
        weakref.finalize(self, _free, cuda, device, address).atexit = False


def _free(cuda: CudaRuntime, device: int, address: int) -> None:
    try:
        cuda.free(device, address)
    except CudaFailed as error:
        _logger.warning("memory stays until this process ends: %s", error)


@contextmanager
def _as_ours(what: str, device: torch.device) -> Iterator[None]:
    """What torch, Triton, its compilers and the driver raise, as `CudaFailed`; ours stays."""
    try:
        yield
    except Exception as error:
        if not _is_foreign(error):
            raise
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise CudaFailed(what, str(device), reason) from error


def _is_foreign(error: Exception) -> bool:
    """Torch and Triton raise classes of their own, and bare RuntimeErrors."""
    library = type(error).__module__.partition(".")[0]
    foreign = (RuntimeError, subprocess.CalledProcessError)
    return isinstance(error, foreign) or library in ("torch", "triton")
