"""What a read by the transfer engine costs: where reading through a gap beats another read.

    python -m benchmarks.reads [--output benchmarks/results/reads.json]

Between two processes of this machine, by TCP over loopback. `GAP_BYTES` of
`weightbus.consumers.planning.reads` is the power of two below the figure `break-even`. Needs the
extra `p2p-cpu` (or `p2p`) and 1 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path

import numpy as np

from weightbus.bus.endpoint import (
    MAX_BATCH_BYTES,
    MAX_ENTRIES,
    Endpoint,
    RemoteRead,
    open_endpoint,
)
from weightbus.consumers.planning.reads import GAP_BYTES

RESULTS = Path(__file__).parent / "results"
ADDRESS = "127.0.0.1"
REGION_BYTES = 256 * 2**20
RUNS = 9
SMALL_BYTES = 4096
SIZES = (4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20, MAX_BATCH_BYTES)


def make_region(endpoint: Endpoint) -> np.ndarray:
    """Touched and registered."""
    region = np.frombuffer(mmap.mmap(-1, REGION_BYTES), dtype=np.uint8)
    region[:] = 1
    endpoint.register(region.ctypes.data, REGION_BYTES)
    return region


def serve() -> None:
    """Offer a region until standard input ends."""
    report = os.dup(1)
    os.dup2(2, 1)
    with open_endpoint(ADDRESS) as endpoint:
        region = make_region(endpoint)
        os.write(report, f"{endpoint.session} {region.ctypes.data}\n".encode())
        sys.stdin.read()


@contextmanager
def server() -> Iterator[tuple[str, int]]:
    """(session, address) of a region in another process."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.reads", "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        session, address = process.stdout.readline().split()
        try:
            yield session, int(address)
        finally:
            process.kill()


def seconds(endpoint: Endpoint, session: str, here: int, there: int, size: int, n: int) -> float:
    """Of one batch of n reads of `size` bytes, none next to another; the best of some runs."""
    step = max(2 * size, 2 * SMALL_BYTES) if n > 1 else size
    reads = [RemoteRead(here + i * step, there + i * step, size) for i in range(n)]
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        endpoint.read(session, reads)
        times.append(time.perf_counter() - start)
    return min(times)


def measure() -> dict[str, float]:
    figures: dict[str, float] = {}
    with server() as (session, there), open_endpoint(ADDRESS) as endpoint:
        region = make_region(endpoint)
        here = region.ctypes.data
        seconds(endpoint, session, here, there, MAX_BATCH_BYTES, 1)  # connects
        for size in SIZES:
            took = seconds(endpoint, session, here, there, size, 1)
            figures[f"one read of {size:,} bytes, us"] = took * 1e6
            figures[f"one read of {size:,} bytes, GB/s"] = size / took / 1e9
        rate = MAX_BATCH_BYTES / seconds(endpoint, session, here, there, MAX_BATCH_BYTES, 1)
        many = seconds(endpoint, session, here, there, SMALL_BYTES, MAX_ENTRIES)
        few = seconds(endpoint, session, here, there, SMALL_BYTES, MAX_ENTRIES // 4)
        entry_s = (many - few) / (MAX_ENTRIES - MAX_ENTRIES // 4) - SMALL_BYTES / rate
        figures["rate of large reads, GB/s"] = rate / 1e9
        figures["one read more in a batch, us"] = entry_s * 1e6
        figures["break-even, bytes"] = entry_s * rate
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "reads.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    figures = {name: round(value, 3) for name, value in measure().items()}
    for name, value in figures.items():
        print(f"{name:40} {value:>14,.3f}")
    print(f"{'GAP_BYTES':40} {GAP_BYTES:>14,}")
    versions = {
        found.name: found.version for found in distributions() if found.name.startswith("mooncake")
    }
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "packages": versions}
    options.output.write_text(
        json.dumps(machine | {"gap_bytes": GAP_BYTES, "figures": figures}, indent=2) + "\n"
    )
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
