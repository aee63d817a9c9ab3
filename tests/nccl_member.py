"""A worker that is a member of groups: `python -m tests.nccl_member DEVICE [STUB]`.

With a stub of libnccl (`tests.nccl_stub`) it needs no GPU. Every line on stdin is a JSON object
that says what to `do`; it answers with one, which holds `error` and `text` if that failed. `repeat`
answers twice: when it is under way, and when it has ended.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

from tests.nccl_stub import StubCuda, load_stub
from weightbus.bus.cuda import CudaRuntime, open_cuda
from weightbus.bus.nccl import load_nccl, open_nccl
from weightbus.consumers.errors import PeerLost
from weightbus.consumers.transfer.communicators import Communicator, Communicators
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.worker import LaneFill

POLL_S: Final = 1e-3


class Worker:
    """One member of any number of groups."""

    def __init__(self, device: int, stub: str | None) -> None:
        self._device, self._stub = device, load_stub(stub) if stub else None
        self._cuda: CudaRuntime = StubCuda(self._stub, 4) if self._stub else open_cuda()
        self._communicators = Communicators(
            device,
            nccl=(lambda: load_nccl(stub)) if stub else open_nccl,
            cuda=lambda: self._cuda,
        )
        self._opened: dict[str, Communicator] = {}
        self._stream = self._cuda.create_stream(device)
        self._memory: tuple[int, int] = (0, 0)
        """Address and bytes."""

    def do(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        begin = time.monotonic()
        try:
            for answer in getattr(self, f"_{request.pop('do')}")(**request):
                yield {**answer, "took_s": time.monotonic() - begin}
        except WeightBusError as error:
            took_s = time.monotonic() - begin
            yield {"error": type(error).__name__, "text": str(error), "took_s": took_s}

    def _open(self, deadline_s: float, **fill: Any) -> Iterator[dict[str, Any]]:
        free = self._cuda.free_bytes(self._device)
        opened = self._communicators.open(LaneFill(lane=0, number=0, **fill), deadline_s)
        self._opened[opened.group] = opened
        used = free - self._cuda.free_bytes(self._device)
        yield {"incarnation": opened.incarnation, "used_bytes": used}

    def _broadcast(
        self, group: str, root: int, size_bytes: int, seed: int, stall_s: float
    ) -> Iterator[dict[str, Any]]:
        address = self._room(size_bytes)
        is_root = self._opened[group].place == root
        held = random.Random(seed).randbytes(size_bytes) if is_root else bytes(size_bytes)
        self._cuda.write(self._device, address, held)
        self._run(group, root, address, size_bytes, stall_s)
        yield {"sha256": hashlib.sha256(self._read(address, size_bytes)).hexdigest()}

    def _repeat(
        self, group: str, root: int, size_bytes: int, stall_s: float
    ) -> Iterator[dict[str, Any]]:
        address = self._room(size_bytes)
        self._run(group, root, address, size_bytes, stall_s)
        yield {"begun": True}
        last = time.monotonic()
        try:
            while True:
                last = time.monotonic()
                self._run(group, root, address, size_bytes, stall_s)
        except PeerLost as error:
            yield {"error": "PeerLost", "text": str(error), "waited_s": time.monotonic() - last}

    def _drop(self, group: str, deadline_s: float) -> Iterator[dict[str, Any]]:
        self._communicators.drop(group)
        left = self._communicators.wait_burials(deadline_s)
        done = self._cuda.is_done(self._device, self._stream)
        yield {"left": left, "done": done}

    def _close(self, deadline_s: float) -> Iterator[dict[str, Any]]:
        yield {"left": self._communicators.close(deadline_s)}

    def _use(self) -> Iterator[dict[str, Any]]:
        """The device, for anything."""
        address = self._cuda.allocate(self._device, 2**21)
        self._cuda.write(self._device, address, b"usable")
        used = self._cuda.read(self._device, address, 6).decode()
        self._cuda.free(self._device, address)
        yield {"read": used}

    def _refuse(self, call: str, code: int, text: str = "") -> Iterator[dict[str, Any]]:
        assert self._stub is not None
        self._stub.stub_refuse(call.encode(), code, text.encode())
        yield {}

    def _run(self, group: str, root: int, address: int, size_bytes: int, stall_s: float) -> None:
        """One broadcast, to its end, as whoever fills a lane waits for it."""
        opened = self._opened[group]
        opened.broadcast(address, size_bytes, root, self._stream, queue_s=stall_s)
        end = time.monotonic() + stall_s
        while not self._cuda.is_done(self._device, self._stream):
            opened.check()
            if time.monotonic() >= end:
                raise PeerLost(group, (), f"it stood still for {stall_s:g} s")
            time.sleep(POLL_S)

    def _room(self, size_bytes: int) -> int:
        address, room = self._memory
        if room < size_bytes:
            address = self._cuda.allocate(self._device, size_bytes)
            self._memory = address, size_bytes
        return address

    def _read(self, address: int, size_bytes: int) -> bytes:
        held = bytearray(size_bytes)
        self._cuda.read_into(self._device, address, memoryview(held))
        return bytes(held)


def main() -> None:
    import torch.distributed  # a worker has loaded it long before it is asked for anything

    assert torch.distributed.is_available()
    device, *stub = sys.argv[1:]
    worker = Worker(int(device), stub[0] if stub else None)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        for answer in worker.do(json.loads(line)):
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
