"""Bytes come to their addresses from memory and files alike, and calls that hang keep nothing."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from tests.unit.transfer.blocks import open_block
from weightbus.consumers.errors import (
    DeadlineExceeded,
    RouteUnavailable,
    SegmentUnavailable,
    TornRead,
)
from weightbus.consumers.transfer.fetch import (
    Fetcher,
    LocalSegments,
    MixedFetcher,
    Read,
    ReplaceableFetcher,
    open_fetcher,
)
from weightbus.consumers.transfer.p2p import P2pRoute
from weightbus.consumers.transfer.sources import Sources
from weightbus.consumers.transfer.together import Calls
from weightbus.schemas.layout import Layout, SegmentSpec
from weightbus.schemas.placement import CudaSegment, FileSegment, RemoteSegment, Segment

pytestmark = pytest.mark.anyio

HOST = "host"
DEADLINE_S = 20.0
SHORT_S = 0.05
NEVER = cast(Any, None)


def layout_of(*sizes: int) -> Layout:
    return Layout((), (), tuple(map(SegmentSpec, sizes)))


class Memory:
    def __init__(self, size: int) -> None:
        self.buffer = ctypes.create_string_buffer(size)
        self.address = ctypes.addressof(self.buffer)


async def test_runs_come_from_memory_and_files_when_both_are_there(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(bytes(range(200)))
    local, memory = LocalSegments(HOST, [str(tmp_path)]), Memory(64)
    with open_block(b"abcdefgh", HOST) as block:
        ways: list[Segment] = [FileSegment(path=str(path)), block.segment()]
        for _ in range(2):
            async with open_fetcher(ways, layout_of(200, 8), local, DEADLINE_S) as fetcher:
                await fetcher.adopt(memory.address, 64)
                reads = [
                    Read(1, 2, memory.address, 3),
                    Read(0, 100, memory.address + 10, 20),
                    Read(1, 0, memory.address + 40, 8),
                ]
                await fetcher.fetch(reads, DEADLINE_S)
                await fetcher.check(DEADLINE_S)
                await fetcher.release(memory.address)
                assert not fetcher.writing()
            assert memory.buffer.raw[:3] == b"cde"
            assert memory.buffer.raw[10:30] == bytes(range(100, 120))
            assert memory.buffer.raw[40:48] == b"abcdefgh"
    local.close()


async def test_check_fails_when_a_segment_was_written_meanwhile() -> None:
    local, memory = LocalSegments(HOST), Memory(8)
    with open_block(b"abcdefgh", HOST) as block:
        async with open_fetcher([block.segment()], layout_of(8), local, DEADLINE_S) as fetcher:
            await fetcher.fetch([Read(0, 0, memory.address, 8)], DEADLINE_S)
            block.write(b"ABCDEFGH")
            with pytest.raises(TornRead):
                await fetcher.check(DEADLINE_S)
    local.close()


async def test_fetch_fails_when_a_segment_was_written_before_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(b"a" * 8)
    local, memory = LocalSegments(HOST, [str(tmp_path)]), Memory(16)
    with open_block(b"abcdefgh", HOST) as block:
        ways: list[Segment] = [block.segment(), FileSegment(path=str(path))]
        async with open_fetcher(ways, layout_of(8, 8), local, DEADLINE_S) as fetcher:
            await fetcher.fetch([Read(0, 0, memory.address, 8)], DEADLINE_S)
            block.write(b"ABCDEFGH")
            os.utime(path, ns=(1, 1))
            for segment in (0, 1):
                with pytest.raises(TornRead):
                    await fetcher.fetch([Read(segment, 0, memory.address, 8)], DEADLINE_S)
    local.close()


async def test_what_is_replaceable_is_replaced_for_good_when_it_tears(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(b"abcdefgh")
    local, memory = LocalSegments(HOST, [str(tmp_path)]), Memory(8)
    layout, read = layout_of(8), [Read(0, 0, memory.address, 8)]
    with open_block(b"ABCDEFGH", HOST) as block:
        async with (
            local.open({0: block.segment()}, layout, DEADLINE_S) as first,
            local.open({0: FileSegment(path=str(path))}, layout, DEADLINE_S) as then,
        ):
            both = ReplaceableFetcher("the copy", first, then, lambda: True)
            await both.fetch(read, DEADLINE_S)
            assert memory.buffer.raw == b"ABCDEFGH"
            block.write(b"ABCDEFG!")
            await both.check(DEADLINE_S)  # that was later
            await both.fetch(read, DEADLINE_S)
            assert memory.buffer.raw == b"abcdefgh"
            retired = ReplaceableFetcher("the copy", first, then, lambda: False)
            await retired.fetch(read, DEADLINE_S)
            assert not both.writing()
    local.close()


async def test_staging_never_reads_memory_of_gpus() -> None:
    way = CudaSegment(handle=bytes(64), host_id=HOST, device_uuid="GPU-0", generation=2)
    local, layout = LocalSegments(HOST), layout_of(8)
    with pytest.raises(SegmentUnavailable, match="this one is on cpu"):
        async with open_fetcher([way], layout, local, DEADLINE_S):
            pytest.fail("opened")
    sources = Sources(local, HOST)
    for devices in ([], ["cuda:0"]):
        P2pRoute(None, NEVER, local, HOST).know_devices(devices)
        with pytest.raises(RouteUnavailable, match="offered neither to this host nor to others"):
            sources.reach("p2p", layout, ((way,),))
    with open_block(b"abcdefgh", HOST) as block:
        assert sources.reach("p2p", layout, ((way, block.segment()),)) == (block.segment(),)
    local.close()


async def test_read_is_refused_when_it_ends_beyond_its_segment() -> None:
    local, memory = LocalSegments(HOST), Memory(8)
    with open_block(b"abcdefgh", HOST) as block:
        async with open_fetcher([block.segment()], layout_of(8), local, DEADLINE_S) as fetcher:
            with pytest.raises(SegmentUnavailable, match="at least 9"):
                await fetcher.fetch([Read(0, 1, memory.address, 8)], DEADLINE_S)
    local.close()


async def test_open_is_refused_when_a_segment_is_elsewhere_and_nobody_reads_there() -> None:
    way = RemoteSegment(protocol="tcp", session="h:1", address=1, generation=2)
    with pytest.raises(SegmentUnavailable, match="another host"):
        async with open_fetcher([way], layout_of(8), LocalSegments(HOST), DEADLINE_S):
            pass


class Hung(Fetcher):
    """Its thread hangs until the test has ended."""

    def __init__(self) -> None:
        self.go_on, self.calls = threading.Event(), Calls()

    async def fetch(self, reads: Sequence[Read], deadline_s: float) -> None:
        try:
            with anyio.fail_after(deadline_s):
                await self.calls.run(self.go_on.wait)
        except TimeoutError as error:
            raise DeadlineExceeded("fetch", deadline_s) from error

    async def check(self, deadline_s: float) -> None: ...

    def writing(self) -> bool:
        return self.calls.running > 0

    async def adopt(self, address: int, size_bytes: int) -> None: ...

    async def release(self, address: int) -> None: ...


async def test_fetch_ends_at_its_deadline_and_says_that_it_writes_when_a_thread_hangs() -> None:
    hung = Hung()
    mixed = MixedFetcher({0: hung})
    ended = anyio.Event()
    try:
        with pytest.raises(DeadlineExceeded, match="fetch"):
            await mixed.fetch([Read(0, 0, 0, 1)], SHORT_S)
        assert mixed.writing()
        loop_token = anyio.lowlevel.current_token()
        hung.calls.when_ended(lambda: anyio.from_thread.run_sync(ended.set, token=loop_token))
    finally:
        hung.go_on.set()
    with anyio.fail_after(DEADLINE_S):
        await ended.wait()
    assert not mixed.writing()
