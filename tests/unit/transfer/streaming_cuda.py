"""A fake CUDA whose streams run beside the caller, each in a thread of its own.

What is queued takes its time, and spoils its destination first: who reads too early, or waits for
the wrong thing, reads what is wrong. Broadcasts are in `tests.unit.transfer.device_fleet`.
"""

from __future__ import annotations

import ctypes
import queue
import random
import threading
import time
from collections.abc import Callable

from tests.fake_cuda import FakeCuda
from weightbus.bus.errors import CudaFailed

__all__ = ("StreamingCuda",)

PATIENCE_S = 30.0
SPOILED = 0xA5

Work = Callable[[], None]


class _Stream:
    """One thread that does what is queued, in its order."""

    def __init__(self) -> None:
        self.queued = self.done = 0
        self.failure: Exception | None = None
        self._works: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, work: Work) -> None:
        self.queued += 1
        self._works.put(work)

    def end(self) -> None:
        self._works.put(None)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "what was queued stands still"

    def _run(self) -> None:
        while (work := self._works.get()) is not None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - told by whoever asks for the stream
                self.failure = error
            self.done += 1


class StreamingCuda(FakeCuda):
    """One process of a machine.

    Args:
        slowly_s: a copy takes at most so long.
        other: a process of the same machine; None: of another one.
    """

    def __init__(
        self, devices: int = 1, *, slowly_s: float = 0.0, other: StreamingCuda | None = None
    ) -> None:
        super().__init__(devices, machine=other._machine if other else None)
        self._slowly_s = slowly_s
        self._random = random.Random(devices)
        self._running: dict[int, _Stream] = {}
        self.copied: list[tuple[int, int, int]] = []
        """(Destination, source, bytes) of every copy, as they were queued."""
        self.before_copy: Callable[[int], None] = lambda number: None

    def copy_async(
        self, device: int, destination: int, source: int, size_bytes: int, stream: int
    ) -> None:
        self._enter("copy_async", device)
        pause_s = self._random.uniform(0, self._slowly_s)
        number = len(self.copied)
        self.copied.append((destination, source, size_bytes))

        def copy() -> None:
            self.before_copy(number)
            ctypes.memset(destination, SPOILED, size_bytes)
            time.sleep(pause_s)
            ctypes.memmove(destination, source, size_bytes)

        self._queued(stream, copy)

    def add(self, stream: int, work: Work) -> None:
        """Queue something else."""
        self._queued(stream, work)

    def create_stream(self, device: int) -> int:
        stream = super().create_stream(device)
        self._running[stream] = _Stream()
        return stream

    def destroy_stream(self, device: int, stream: int) -> None:
        super().destroy_stream(device, stream)
        self._running.pop(stream).end()

    def is_done(self, device: int, stream: int) -> bool:
        running = self._running[stream]
        if running.failure is not None:
            raise CudaFailed("stream", f"{stream:#x}", str(running.failure))
        return running.done == running.queued

    def _queued(self, stream: int, work: Work) -> None:
        self._running[stream].add(work)
