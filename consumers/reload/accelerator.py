"""A GPU as torch sees it: one stream, memory by address, and errors that are ours.

Owns a stream. Work is queued inside `work`, and all of it is done when `work` ends, also by an
error: only then may the memory that it touches go away.
"""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from weightbus.bus.errors import CudaFailed

__all__ = ("Accelerator", "CudaAccelerator")

_POLL_S: Final = 20e-6
"""Between two looks at the device: short beside an update, and other threads run meanwhile."""

_PROGRAMS_PER_PROCESSOR: Final = {"host": 1, "device": 8}
"""Programs of a kernel that saturate PCIe, or NVLink (lab/RESULTS.md)."""


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

    @abstractmethod
    def programs(self, sources: Iterable[int]) -> int:
        """How many programs of a kernel read at such addresses at the speed of the link."""

    def kernels(self) -> ModuleType:
        """What is written in Triton, which is loaded when it is first asked for."""
        return importlib.import_module("weightbus.consumers.reload.kernels")

    def uploaded(self, integers: npt.NDArray[np.int64]) -> torch.Tensor:
        """A copy on the device; `integers` may change at once. Also outside of `work`.

        Raises:
            CudaFailed: the device has no room for it.
        """
        return torch.from_numpy(np.ascontiguousarray(integers)).to(self.device, copy=True)


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
        with _as_ours(f"{integers.nbytes:,} bytes of a table", self.device):
            return super().uploaded(integers)

    def memory(self, address: int, size_bytes: int) -> torch.Tensor:
        return torch.as_tensor(_Raw(address, size_bytes), device=self.device)

    def downloaded(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)

    def programs(self, sources: Iterable[int]) -> int:
        place = "host" if any(map(_is_host_memory, sources)) else "device"
        return self._processors * _PROGRAMS_PER_PROCESSOR[place]

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


def _is_host_memory(address: int) -> bool:
    """Whether CUDA knows an address as registered memory of the host. Touches nothing there."""
    byte = (ctypes.c_char * 1).from_address(address)
    return torch.frombuffer(byte, dtype=torch.uint8).is_pinned()


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
