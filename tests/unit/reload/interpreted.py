"""An executor for GPUs that works in main memory: its kernels are run by Triton's interpreter."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch

from tests.interpreted import interpreted
from weightbus.consumers.reload.accelerator import Accelerator
from weightbus.consumers.reload.gpu import GpuExecutor
from weightbus.consumers.reload.threads import Threads
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs
from weightbus.schemas.worker import Cell

__all__ = ("HostAccelerator", "interpreted_executor", "interpreting")

PROGRAMS = 3
"""Of a launch: the interpreter runs them one after the other."""

_loaded: list[ModuleType] = []


@contextmanager
def interpreting() -> Iterator[None]:
    """Executors work within. Skips the test where there is no Triton."""
    with interpreted("weightbus.consumers.reload.kernels") as module:
        _loaded.append(module)
        try:
            yield
        finally:
            _loaded.pop()


class HostAccelerator(Accelerator):
    """Main memory; what is queued is done at once."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.is_working = False

    @contextmanager
    def work(self, what: str) -> Iterator[None]:
        assert not self.is_working, what
        self.is_working = True
        try:
            yield
        finally:
            self.is_working = False

    def memory(self, address: int, size_bytes: int) -> torch.Tensor:
        assert self.is_working
        memory = (ctypes.c_char * size_bytes).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def downloaded(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self.is_working
        return tensor.clone()

    def kernels(self) -> ModuleType:
        return _loaded[-1]

    @property
    def programs(self) -> int:
        return PROGRAMS


def interpreted_executor(
    layout: Layout, needs: Needs, cells: Sequence[Cell], threads: Threads | None = None
) -> GpuExecutor:
    """An executor for GPUs whose parameters are in main memory; it has no use for threads."""
    return GpuExecutor(layout, needs, cells, HostAccelerator())
