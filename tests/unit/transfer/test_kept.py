"""Memory of a copy stays where it is until nothing writes to it, however its transfer ended."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from tests.clocks import unmeasured_clock
from weightbus.bus.connection import Bus
from weightbus.bus.endpoint import Endpoint
from weightbus.bus.errors import BusTimeout, EndpointFailed
from weightbus.consumers.transfer.fetch import Fetcher, LocalSegments, Read
from weightbus.consumers.transfer.kept import KeptCopy
from weightbus.consumers.transfer.p2p import P2pRoute
from weightbus.consumers.transfer.staged import Clock, Staging
from weightbus.consumers.transfer.staging import BlockPool
from weightbus.consumers.transfer.together import Calls
from weightbus.schemas.layout import Layout, SegmentSpec

pytestmark = pytest.mark.anyio

HOST = "host"
DEADLINE_S = 20.0
LAYOUT = Layout((), (), (SegmentSpec(1 << 20), SegmentSpec(4096)))


class FakeEndpoint:
    """What is registered, and where forgetting fails."""

    protocol, session = "tcp", "h:1"

    def __init__(self) -> None:
        self.known: set[int] = set()
        self.refuses = False

    def register(self, address: int, size_bytes: int) -> None:
        self.known.add(address)

    def unregister(self, address: int) -> None:
        if self.refuses:
            raise EndpointFailed("unregistering memory", f"{address:#x}", "code 1")
        self.known.remove(address)


class FakeBus:
    def __init__(self) -> None:
        self.clock = unmeasured_clock()
        self.said: list[Any] = []
        self.is_silent = False

    async def publish(self, message: object) -> None:
        if self.is_silent:
            raise BusTimeout("publish", 1.0)
        self.said.append(message)


class Writer(Fetcher):
    """A thread that goes on writing after its call was left, until it is told to end."""

    def __init__(self) -> None:
        self.begun, self.go_on = anyio.Event(), threading.Event()
        self.calls = Calls()
        self.address = 0

    async def fetch(self, reads: Sequence[Read], stall_s: float) -> None:
        (read,) = reads
        self.address = read.address

        def write() -> None:
            anyio.from_thread.run_sync(self.begun.set)
            assert self.go_on.wait(DEADLINE_S)
            if is_mapped(read.address):  # or this process would end here
                ctypes.memset(read.address, 1, read.size_bytes)

        await self.calls.run(write)

    async def check(self, deadline_s: float) -> None: ...

    def writing(self) -> bool:
        return self.calls.running > 0

    async def adopt(self, address: int, size_bytes: int) -> None: ...

    async def release(self, address: int) -> None: ...


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(word, 16) for word in line.split()[0].split("-"))
        if begin <= address < end:
            return "weightbus-copy" in line
    return False


def kept_copy(endpoint: FakeEndpoint | None = None, bus: FakeBus | None = None) -> KeptCopy:
    return KeptCopy(
        cast(Bus, bus or FakeBus()), "m.test-kept", "e", HOST, cast(Endpoint | None, endpoint)
    )


async def ended(writer: Writer) -> None:
    writer.go_on.set()
    with anyio.fail_after(DEADLINE_S):
        while True:
            if not writer.writing():
                return
            await anyio.sleep(0.001)


async def test_memory_stays_mapped_and_registered_when_the_transfer_is_cancelled() -> None:
    endpoint, writer = FakeEndpoint(), Writer()
    kept, pool = kept_copy(endpoint), BlockPool("m.e")
    route = P2pRoute(None, Staging(pool, 10.0), LocalSegments(HOST), HOST, kept=kept)
    transfer = cast(Any, type("T", (), {"layout": LAYOUT, "deadline_s": DEADLINE_S}))
    blocks = await kept.begin(LAYOUT)
    names = [block.name for block in blocks]
    clock = Clock("fetch", DEADLINE_S)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(route._through_copy, transfer, writer, kept, blocks, clock)
        await writer.begun.wait()
        tasks.cancel_scope.cancel()
    del blocks
    assert not [name for name in names if (Path("/dev/shm") / name).exists()]
    try:
        assert is_mapped(writer.address)
        assert len(endpoint.known) == 2
        await kept.begin(LAYOUT)
        assert len(endpoint.known) == 4, "it is written to"
    finally:
        await ended(writer)
    await kept.begin(LAYOUT)
    assert len(endpoint.known) == 2
    assert not is_mapped(writer.address)
    await kept.close()
    assert endpoint.known == set()
    pool.close()


async def test_first_cause_comes_out_when_the_transfer_engine_does_not_forget(
    caplog: pytest.LogCaptureFixture,
) -> None:
    endpoint = FakeEndpoint()
    kept = kept_copy(endpoint)
    (first, _) = await kept.begin(LAYOUT)
    address = first.address
    endpoint.refuses = True
    kept.spoil(lambda: False)
    await kept.begin(LAYOUT)
    assert caplog.text.count("stays registered") == 2
    assert is_mapped(address), "peers may read it yet"
    endpoint.refuses = False
    await kept.close()


async def test_close_keeps_the_memory_that_is_written_to() -> None:
    kept, is_written = kept_copy(), [True]
    (first, _) = await kept.begin(LAYOUT)
    address = first.address
    kept.spoil(lambda: is_written[0])
    del first
    await kept.close()
    assert is_mapped(address)


async def test_nothing_is_offered_that_was_not_filled_since_it_was_begun() -> None:
    bus = FakeBus()
    kept = kept_copy(bus=bus)
    await kept.begin(LAYOUT)
    kept.end()
    await kept.offer(1, "0" * 64, 1)
    bus.is_silent = True
    with pytest.raises(BusTimeout):
        await kept.begin(LAYOUT)
    bus.is_silent = False
    await kept.offer(2, "0" * 64, 2)
    assert [message.version for message in bus.said] == [1], "these are the bytes of version 1"
    await kept.close()
