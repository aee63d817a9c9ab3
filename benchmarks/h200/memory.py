"""GPU memory in use, sampled in a thread. Without a GPU there is none.

Counted per GPU is what all processes use, less what the trainers use if NVML tells them apart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch

__all__ = ("Memory", "Samples", "open_memory")

PERIOD_S: Final = 0.002


@dataclass
class Samples:
    """Bytes in use of every GPU, and when."""

    taken: list[tuple[int, list[int]]] = field(default_factory=list)

    def over(self, rest: Sequence[int], since_ns: int = 0) -> int:
        """By how much the most that was in use exceeds what was at rest, where it does so most."""
        counted = [used for at_ns, used in self.taken if at_ns >= since_ns]
        return max(max(used[gpu] for used in counted) - before for gpu, before in enumerate(rest))


class Memory:
    """Of the first GPUs of this machine.

    Args:
        used: bytes in use on every GPU, but for those of some processes.
    """

    def __init__(self, used: Callable[[set[int]], list[int]]) -> None:
        self.ignored: set[int] = set()
        """Process ids of the trainers."""
        self._used = used

    def used(self) -> list[int]:
        return self._used(self.ignored)

    @contextmanager
    def sampled(self) -> Iterator[Samples]:
        """Samples from here to the end of the block, which has the last."""
        samples, ended = Samples(), threading.Event()

        def sample() -> None:
            while not ended.wait(PERIOD_S):
                samples.taken.append((time.time_ns(), self.used()))

        thread = threading.Thread(target=sample, name="gpu-memory", daemon=True)
        thread.start()
        try:
            yield samples
        finally:
            ended.set()
            thread.join()
            samples.taken.append((time.time_ns(), self.used()))


def open_memory(devices: int) -> Memory:
    """By NVML if its Python package is there, else by the CUDA runtime."""
    nvml = _nvml(devices)
    return Memory(nvml or (lambda _: [_in_use(device) for device in range(devices)]))


def _in_use(device: int) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def _nvml(devices: int) -> Callable[[set[int]], list[int]] | None:
    try:
        import pynvml
    except ImportError:
        return None
    nvml: Any = pynvml
    nvml.nvmlInit()
    handles = [nvml.nvmlDeviceGetHandleByIndex(device) for device in range(devices)]

    def used(handle: Any, ignored: set[int]) -> int:
        total = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle) if ignored else ()
        return total - sum(int(p.usedGpuMemory or 0) for p in processes if p.pid in ignored)

    return lambda ignored: [used(handle, ignored) for handle in handles]
