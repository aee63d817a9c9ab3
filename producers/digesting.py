"""Who digests a slot in host memory as it is filled: threads of the CPU, or the GPU that fills it.

Blocking; used in worker threads. Both digest the slot, not the tensors: what readers will see. A
thread takes some 1 GB/s; a GPU takes what the link gives, while the copies go the other way. It
keeps 48 bytes of its memory per 128 KiB of the part, and 8 per shard: 11 MB for 30 GB.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from weightbus.bus.digest import digest_box
from weightbus.bus.errors import CudaFailed, CudaUnavailable
from weightbus.producers.copying import Copier
from weightbus.producers.devices import Devices, Digest, Stream
from weightbus.producers.digests import Sums
from weightbus.producers.memory import keep
from weightbus.producers.shards import box_bytes
from weightbus.schemas.dtypes import DTYPE_BYTES
from weightbus.schemas.layout import Layout, ShardSpec

__all__ = ("DeviceDigester", "DeviceDigesters", "Digester", "ThreadDigester")

_logger = logging.getLogger(__name__)


class Digester(ABC):
    """Digests one version, run by run of its shards. For one thread; never waits but in the end."""

    @abstractmethod
    def start(self, begin: int, end: int, copier: Copier) -> None:
        """Digest shards `begin` to `end` once all that the copier was given by now is copied.

        Raises:
            CudaFailed: a device failed.
        """

    @abstractmethod
    def finish(self) -> Sums:
        """The partial digest of every shard, in layout order.

        Raises:
            CudaFailed: a device failed.
            CudaTimeout: it may go on reading the slot.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Begin nothing more."""

    @abstractmethod
    def mark(self) -> Callable[[], None]:
        """As `Copier.mark`, of what is queued on a device."""

    @abstractmethod
    def close(self) -> None:
        """Wait for threads of its own. Called in the end, whatever has failed."""


class ThreadDigester(Digester):
    """By threads of the CPU."""

    def __init__(self, layout: Layout, data: memoryview, threads: int) -> None:
        self._layout, self._written = layout, np.frombuffer(data, dtype=np.uint8)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="weightbus-digest")
        self._runs: list[Future[list[int]]] = []

    def start(self, begin: int, end: int, copier: Copier) -> None:
        shards = self._layout.shards[begin:end]
        self._runs.append(self._pool.submit(self._digest, shards, copier.mark()))

    def finish(self) -> Sums:
        return np.array([each for run in self._runs for each in run.result()], dtype=np.uint64)

    def cancel(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def mark(self) -> Callable[[], None]:
        return lambda: None

    def close(self) -> None:
        self._pool.shutdown()

    def _digest(self, shards: Sequence[ShardSpec], wait: Callable[[], None]) -> list[int]:
        wait()
        digests = []
        for shard in shards:
            spec = self._layout.tensors[shard.tensor]
            itemsize = DTYPE_BYTES[spec.dtype]
            end = shard.offset_bytes + box_bytes(self._layout, shard)
            box = self._written[shard.offset_bytes : end]
            digests.append(digest_box(box, spec.shape, itemsize, shard.starts, shard.sizes))
        return digests


class DeviceDigester(Digester):
    """By a GPU that reads the slot where it is, on a stream of its own: it does not hold up copies.

    A run of 64 MiB is some 512 programs at a time: they wait for the link, and leave most of the
    GPU to the trainer.
    """

    def __init__(self, digest: Digest, stream: Stream, address: int) -> None:
        """`address`: of the slot's bytes, registered with CUDA."""
        self._digest, self._stream, self._address = digest, stream, address

    def start(self, begin: int, end: int, copier: Copier) -> None:
        copier.precede(self._stream)
        with self._stream.use():
            self._digest.start(self._address, begin, end)

    def finish(self) -> Sums:
        self._stream.wait()
        with self._stream.use():
            return self._digest.finish()

    def cancel(self) -> None:
        """What has begun is queued, and done soon."""

    def mark(self) -> Callable[[], None]:
        return self._stream.mark()

    def close(self) -> None:
        """It has no threads."""


class DeviceDigesters:
    """Of one publisher. Keeps for every GPU what it needs for the last layout that it was given."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._streams: dict[int, Stream] = {}
        self._digests: dict[int, tuple[Layout, Digest]] = {}
        self._unavailable: set[int] = set()
        self._told = False

    def open(self, number: int, layout: Layout, address: int) -> Digester | None:
        """For a slot at an address that this GPU reads; None: it cannot, and that was said once."""
        if number in self._unavailable:
            return None
        try:
            return self._open(number, layout, address)
        except CudaUnavailable as error:
            self._unavailable.add(number)
            self._tell(number, error.reason)
        except CudaFailed as error:  # maybe for want of memory: tried again for the next version
            self._tell(number, str(error))
        return None

    def leave(self, number: int) -> None:
        """What a GPU has not done in time is left to it, with what it reads; nothing follows it."""
        keep((self._streams.pop(number, None), self._digests.pop(number, None)))

    def _open(self, number: int, layout: Layout, address: int) -> Digester:
        device = self._devices.device(number)
        if number not in self._streams:
            device.check_kernels()
            self._streams[number] = device.new_stream()
        stream = self._streams[number]
        if number not in self._digests or self._digests[number][0] != layout:
            self._digests.pop(number, None)  # its memory, before there is more
            with stream.use():
                self._digests[number] = layout, device.open_digest(layout)
        return DeviceDigester(self._digests[number][1], stream, address)

    def _tell(self, number: int, reason: str) -> None:
        if not self._told:
            self._told = True
            _logger.warning(
                "slots in host memory are digested by the CPU, not by GPU %d, which takes longer:"
                " %s",
                number,
                reason,
            )
