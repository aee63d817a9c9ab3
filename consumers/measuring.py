"""What one host's links can do, measured: the rates that routes are chosen by.

Owns, for about `MEASURE_S` each, a block of shared memory, a file, two members of a group on this
host's loopback, or a second process to read from. Every rate is in bytes per second. What crosses a
network is measured on loopback, so that it is the rate of the software; the network's own is what
the system says of its cards.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import anyio
import anyio.abc
import anyio.to_thread
import numpy as np
from anyio.streams.buffered import BufferedByteReceiveStream

from weightbus.bus.blocks import SHM_DIRECTORY, SHM_PREFIX, SharedBlock
from weightbus.bus.endpoint import MAX_BATCH_BYTES, Endpoint, RemoteRead, open_endpoint
from weightbus.consumers.errors import DeadlineExceeded, MeasuringFailed
from weightbus.consumers.transfer.groups import GlooExchange, Groups, open_meeting
from weightbus.schemas.rounds import Group, Member

__all__ = (
    "measure_broadcast",
    "measure_disk",
    "measure_memory",
    "measure_p2p",
    "open_block",
)

MEASURE_S: Final = 1.0
"""How long is measured, after a first turn that is not counted."""

MEASURE_BYTES: Final = 128 * 2**20
"""Moved in one turn: more than caches hold."""

BUCKET_BYTES: Final = 16 * 2**20
"""Of one broadcast."""

DEADLINE_S: Final = 20.0
"""Of what waits for others: a process that starts, members that meet."""

STOP_S: Final = 5.0
"""Of a process that is no longer needed."""

MAX_THREADS: Final = 8
"""That copy side by side: a memory bus is full with fewer."""


def measure_memory(size_bytes: int = MEASURE_BYTES) -> int:
    """Mapped shared memory -> private memory, by as many threads as there are processors.

    Raises:
        SharedMemoryFull, SharedMemoryUnavailable: there is no room for a block.
    """
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    target = np.zeros(size_bytes, dtype=np.uint8)
    with open_block("memory", size_bytes) as block:
        source = np.frombuffer(block.data, dtype=np.uint8)
        sources, targets = np.array_split(source, threads), np.array_split(target, threads)

        def turn() -> int:
            workers = [
                threading.Thread(target=np.copyto, args=pair)
                for pair in zip(targets, sources, strict=True)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            return size_bytes

        return _rate(turn)


def measure_disk(directory: Path, size_bytes: int = MEASURE_BYTES) -> int:
    """A file in `directory` -> memory, past the page cache as far as the file system allows.

    Raises:
        MeasuringFailed: the directory cannot be written to, or the file not be read.
    """
    target = mmap.mmap(-1, size_bytes)
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            for _ in range(0, size_bytes, BUCKET_BYTES):
                file.write(os.urandom(BUCKET_BYTES))
            file.flush()
            os.fsync(file.fileno())

            def turn() -> int:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return os.preadv(file.fileno(), [target], 0)

            return _rate(turn)
    except OSError as error:
        raise MeasuringFailed("disk", f"{directory}: {error.strerror}") from error


async def measure_broadcast(address: str) -> int:
    """What a second member of a group receives, over `address`, an address of this host.

    Raises:
        RouteUnavailable: there is no gloo, or the address is not this host's.
        PeerLost, DeadlineExceeded: the two members lost each other.
    """
    memories = [np.zeros(BUCKET_BYTES, dtype=np.uint8) for _ in range(2)]
    with ExitStack() as stack:
        meeting = await anyio.to_thread.run_sync(stack.enter_context, open_meeting(address))
        sides = [Groups(address) for _ in memories]
        for groups in sides:
            stack.callback(groups.close, MEASURE_S)
        members = tuple(Member(f"member-{place}", 0) for place in range(len(sides)))
        group = Group(id="doctor-1", members=members, rendezvous=meeting.rendezvous)
        exchanges: list[GlooExchange | None] = [None] * len(sides)

        async def meet(place: int) -> None:
            opened = await sides[place].open_all([(group, place)], "doctor", DEADLINE_S)
            exchanges[place] = opened[0]

        async def send(place: int) -> None:
            exchange, memory = exchanges[place], memories[place]
            assert exchange is not None, "both have met"
            await exchange.broadcast(memory.ctypes.data, memory.nbytes, 0, DEADLINE_S)

        await _both(meet)
        await _both(send)
        moved, start = 0, time.perf_counter()
        while (elapsed_s := time.perf_counter() - start) < MEASURE_S:
            await _both(send)
            moved += BUCKET_BYTES
        return round(moved / elapsed_s)


async def measure_p2p(address: str, protocol: str, device: str) -> int:
    """What one reader reads from the memory of another process of this host.

    Raises:
        EndpointUnavailable, EndpointFailed: there is no transfer engine to be had.
        RemoteReadFailed: the other process cannot be read.
        DeadlineExceeded, MeasuringFailed: it did not start.
    """
    program = [sys.executable, "-m", "weightbus.consumers.measuring_source"]
    with ExitStack() as stack:
        opened = open_endpoint(address, protocol, device)
        endpoint = await anyio.to_thread.run_sync(stack.enter_context, opened)
        size = str(MAX_BATCH_BYTES)
        async with await anyio.open_process(
            [*program, address, protocol, device, size], stderr=None
        ) as process:
            try:
                session, there = await _first_line(process)
                return await anyio.to_thread.run_sync(_read, endpoint, session, there)
            finally:
                await _end(process)


@contextmanager
def open_block(what: str, size_bytes: int) -> Iterator[SharedBlock]:
    """A block of shared memory whose pages are there.

    Raises:
        SharedMemoryFull, SharedMemoryUnavailable
    """
    block = SharedBlock(_block_name(what, os.getpid()), size_bytes)
    try:
        np.frombuffer(block.data, dtype=np.uint8)[:] = 1
        yield block
    finally:
        block.close()


def _block_name(what: str, pid: int) -> str:
    return f"{SHM_PREFIX}doctor.{what}.{pid}"


def _rate(turn: Callable[[], int]) -> int:
    """Bytes per second of turns that each move as many bytes as they return."""
    turn()
    moved, start = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - start) < MEASURE_S:
        moved += turn()
    return round(moved / elapsed_s)


async def _both(act: Callable[[int], object]) -> None:
    async with anyio.create_task_group() as tasks:
        for place in range(2):
            tasks.start_soon(act, place)  # type: ignore[arg-type]


def _read(endpoint: Endpoint, session: str, there: int) -> int:
    target = mmap.mmap(-1, MAX_BATCH_BYTES)
    here = np.frombuffer(target, dtype=np.uint8)
    here[:] = 0
    address = here.ctypes.data
    endpoint.register(address, MAX_BATCH_BYTES)
    try:
        reads = [RemoteRead(address, there, MAX_BATCH_BYTES)]

        def turn() -> int:
            endpoint.read(session, reads)
            return MAX_BATCH_BYTES

        return _rate(turn)
    finally:
        endpoint.unregister(address)


async def _end(process: anyio.abc.Process) -> None:
    """Let the other process end, or make it; its block goes with it."""
    assert process.stdin is not None, "a pipe by default"
    with anyio.move_on_after(STOP_S, shield=True):
        await process.stdin.aclose()
        await process.wait()
    if process.returncode is None:
        process.kill()
        with anyio.move_on_after(STOP_S, shield=True):
            await process.wait()
        SHM_DIRECTORY.joinpath(_block_name("source", process.pid)).unlink(missing_ok=True)


async def _first_line(process: anyio.abc.Process) -> tuple[str, int]:
    """The session and the address that the other process offers."""
    assert process.stdout is not None, "a pipe by default"
    try:
        with anyio.fail_after(DEADLINE_S):
            line = await BufferedByteReceiveStream(process.stdout).receive_until(b"\n", 1024)
    except TimeoutError:
        raise DeadlineExceeded("start of the process to read from", DEADLINE_S) from None
    except (anyio.IncompleteRead, anyio.EndOfStream, anyio.DelimiterNotFound):
        raise MeasuringFailed("p2p", "the process to read from ended") from None
    session, _, address = line.decode().rpartition(" ")
    return session, int(address)
