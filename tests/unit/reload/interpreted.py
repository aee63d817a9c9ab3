"""The kernels without a GPU: Triton's interpreter, and an accelerator that is main memory.

Import it before anything runs a kernel. Where there is a GPU kernels are compiled, and `tests/gpu`
has the tests.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from weightbus.consumers.reload.accelerator import Accelerator
from weightbus.consumers.reload.gpu import GpuExecutor
from weightbus.consumers.reload.threads import Threads
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs
from weightbus.schemas.worker import Cell

__all__ = ("HostAccelerator", "interpreted_executor", "why_not_interpreted")

PROGRAMS = 3
"""Of a launch: the interpreter runs them one after the other."""


def why_not_interpreted() -> str:
    """Why kernels cannot be interpreted here; empty: they can."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install triton"
    if torch.cuda.is_available():
        return "kernels are compiled where there is a GPU: see tests/gpu"
    return ""


if not why_not_interpreted():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


class HostAccelerator(Accelerator):
    """Main memory; what is queued is done at once."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.is_working = False
        self.sources: set[int] = set()
        """Addresses that were to be read, of all launches."""

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

    def programs(self, sources: Iterable[int]) -> int:
        self.sources.update(sources)
        return PROGRAMS


def interpreted_executor(
    layout: Layout, needs: Needs, cells: Sequence[Cell], threads: Threads | None = None
) -> GpuExecutor:
    """An executor for GPUs whose parameters are in main memory."""
    _mend_interpreter()
    return GpuExecutor(layout, needs, cells, threads, HostAccelerator())


@cache
def _mend_interpreter() -> None:
    """Triton 3.6 takes the `int` of arrays of one element, which numpy 2.4 refuses."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        for one in scope:
            one.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
