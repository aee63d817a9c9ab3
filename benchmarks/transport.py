"""Processes beside `benchmarks.routes`: a source of one version, and a bare broadcast.

    python -m benchmarks.transport source      # offers random bytes, until stdin ends
    python -m benchmarks.transport broadcast   # one member of a bare gloo group

The argument is a JSON document; `source` answers with one on stdout.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from msgspec import Struct
from msgspec import json as msgspec_json

from weightbus.bus.blocks import SharedBlock
from weightbus.bus.endpoint import open_endpoint, register_block

__all__ = (
    "LOOPBACK",
    "WAIT_S",
    "Broadcast",
    "Source",
    "SourceReady",
    "bare_broadcast",
    "open_group",
)

LOOPBACK = "127.0.0.1"
WAIT_S = 900
"""A member waits for the next run while other things are measured."""


class Source(Struct, frozen=True):
    """What `source` is told."""

    block: str
    size_bytes: int
    seed: int
    address: str = LOOPBACK


class SourceReady(Struct, frozen=True):
    """What `source` answers."""

    generation: int
    session: str
    address: int


class Broadcast(Struct, frozen=True):
    """What `broadcast` is told."""

    port: int
    rank: int
    size: int
    size_bytes: int
    runs: int


def offer(source: Source) -> None:
    """Random bytes in a block that others may map and read."""
    block = SharedBlock(source.block, source.size_bytes)
    data = np.frombuffer(block.begin_write(), dtype=np.uint8)
    random = np.random.default_rng(source.seed)
    for start in range(0, data.size, 2**26):
        part = data[start : start + 2**26]
        part[:] = random.integers(0, 256, part.size, dtype=np.uint8)
    del data, part
    generation = block.end_write()
    with open_endpoint(source.address) as endpoint:
        register_block(endpoint, block)
        ready = SourceReady(generation, endpoint.session, block.address)
        print(msgspec_json.encode(ready).decode(), flush=True)
        sys.stdin.read()
    block.close()


def bare_broadcast(group: dist.ProcessGroupGloo, data: torch.Tensor) -> float:
    """Seconds of one broadcast of a tensor from rank 0, as its caller sees them."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.barrier().wait()
    start = time.perf_counter()
    group.broadcast([data], options).wait()
    group.barrier().wait()
    return time.perf_counter() - start


def open_group(store: dist.Store, rank: int, size: int) -> dist.ProcessGroupGloo:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._timeout = timedelta(seconds=WAIT_S)
    return dist.ProcessGroupGloo(dist.PrefixStore("bare", store), rank, size, options)


def take_part(broadcast: Broadcast) -> None:
    store = dist.TCPStore(LOOPBACK, broadcast.port, timeout=timedelta(seconds=60))
    group = open_group(store, broadcast.rank, broadcast.size)
    data = torch.ones(broadcast.size_bytes, dtype=torch.uint8)
    for _ in range(broadcast.runs):
        bare_broadcast(group, data)


def main() -> None:
    kind, document = sys.argv[1:]
    if kind == "source":
        offer(msgspec_json.decode(document, type=Source))
    else:
        take_part(msgspec_json.decode(document, type=Broadcast))


if __name__ == "__main__":
    main()
