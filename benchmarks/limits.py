"""The bare limits that routes are compared with: no product code but its names for addresses.

Owns the processes of `benchmarks.transport` that it starts; each ends with its context.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from benchmarks.transport import LOOPBACK, WAIT_S, Broadcast, bare_broadcast, open_group
from weightbus.bus.endpoint import RemoteRead, open_endpoint
from weightbus.schemas.placement import RemoteSegment

__all__ = ("RunLimit", "broadcast_limit", "child", "memcpy_limit", "read_limit")

RunLimit = Callable[[], float]
"""Seconds of one run."""


def memcpy_limit(size_bytes: int) -> RunLimit:
    """One copy of one block."""
    source = np.ones(size_bytes, dtype=np.uint8)
    target = np.zeros(size_bytes, dtype=np.uint8)

    def run() -> float:
        start = time.perf_counter()
        ctypes.memmove(target.ctypes.data, source.ctypes.data, size_bytes)
        return time.perf_counter() - start

    return run


@contextmanager
def read_limit(remote: RemoteSegment, size_bytes: int) -> Iterator[RunLimit]:
    """One region, read whole by the bare transfer engine."""
    target = np.ones(size_bytes, dtype=np.uint8)
    with open_endpoint(LOOPBACK) as endpoint:
        endpoint.register(target.ctypes.data, target.nbytes)

        def run() -> float:
            engine = endpoint._engine
            start = time.perf_counter()
            code = engine.transfer_sync_read(
                remote.session, target.ctypes.data, remote.address, target.nbytes
            )
            seconds = time.perf_counter() - start
            if code:
                raise SystemExit(f"the bare read failed with {code}")
            return seconds

        endpoint.read(remote.session, [RemoteRead(target.ctypes.data, remote.address, 4096)])
        yield run
        endpoint.unregister(target.ctypes.data)


@contextmanager
def broadcast_limit(size: int, size_bytes: int, runs: int) -> Iterator[RunLimit]:
    """One tensor to `size` processes, this one among them."""
    store = dist.TCPStore(
        LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=WAIT_S)
    )
    with ExitStack() as children:
        for rank in range(1, size):
            children.enter_context(
                child("broadcast", Broadcast(store.port, rank, size, size_bytes, runs))
            )
        group = open_group(store, 0, size)
        data = torch.ones(size_bytes, dtype=torch.uint8)
        yield lambda: bare_broadcast(group, data)


@contextmanager
def child(kind: str, document: msgspec.Struct) -> Iterator[subprocess.Popen[str]]:
    """A process of `benchmarks.transport`; it ends with its stdin."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.transport", kind, msgspec.json.encode(document)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
