"""Memory that reads go to stays mapped as long as the transfer engine knows it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import cast

import anyio
import anyio.to_thread
import pytest

from weightbus.bus.endpoint import Endpoint
from weightbus.bus.errors import EndpointFailed
from weightbus.consumers.transfer import remote
from weightbus.consumers.transfer.remote import RemoteFetcher
from weightbus.consumers.transfer.staged import open_blocks
from weightbus.consumers.transfer.staging import BlockPool, BlockSpec, StagingBlock

pytestmark = pytest.mark.anyio

SLOT_BYTES = 8192
DEADLINE_S = 20.0


class _Failed(Exception):
    pass


class FakeEngine:
    """As mooncake's: refuses overlapping ranges, and to forget what it does not know."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}
        self.before_unregister: Callable[[], object] = bool
        self.refuses = False

    def get_rpc_port(self) -> int:
        return 1

    def batch_register_memory(self, addresses: list[int], sizes: list[int]) -> int:
        ((address, size),) = zip(addresses, sizes, strict=True)
        if any(one < address + size and address < one + n for one, n in self.known.items()):
            return -7
        self.known[address] = size
        return 0

    def batch_unregister_memory(self, addresses: list[int]) -> int:
        self.before_unregister()
        return 0 if not self.refuses and self.known.pop(addresses[0], 0) else -1


class Stalled(Endpoint):
    """Unregisters, for whoever asks in a thread that is not the pool's, when it may."""

    go_on: threading.Event

    def unregister(self, address: int) -> None:
        if threading.current_thread().name == "left":
            assert self.go_on.wait(DEADLINE_S)
        super().unregister(address)


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(DEADLINE_S):
        while True:  # threads bring it about
            if condition():
                return
            await anyio.sleep(0.001)


def made(tmp_path: Path) -> tuple[FakeEngine, Stalled, BlockPool, RemoteFetcher]:
    engine = FakeEngine()
    endpoint = Stalled(engine, "127.0.0.1", "tcp")
    endpoint.go_on = threading.Event()
    pool = BlockPool("m.e", 0, tmp_path)
    pool.register_with(endpoint)
    return engine, endpoint, pool, RemoteFetcher(endpoint, [], {})


async def test_block_stays_mapped_until_a_release_that_was_put_off_is_done(tmp_path: Path) -> None:
    _, endpoint, pool, fetcher = made(tmp_path)
    reading, begun = threading.Event(), threading.Event()

    def left() -> None:
        threading.current_thread().name = "left"
        begun.set()
        assert reading.wait(DEADLINE_S)

    found: list[tuple[int, weakref.ref[StagingBlock]]] = []

    async def fail() -> None:
        specs = [BlockSpec(pool.name_of("a"), 1, SLOT_BYTES)]
        async with open_blocks(pool, specs, fetcher) as (block,):
            found.append((block.address, weakref.ref(block)))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(fetcher._calls.run, left)
                await until(begun.is_set)
                tasks.cancel_scope.cancel()
            raise _Failed

    with pytest.raises(_Failed):
        await fail()
    ((address, memory),) = found
    reading.set()
    await until(lambda: fetcher._calls.running == 0)  # its thread is about to unregister
    await anyio.to_thread.run_sync(pool.take, [])
    gc.collect()
    assert memory() is not None, "it is registered"
    endpoint.go_on.set()
    await until(lambda: not fetcher.writing())
    await anyio.to_thread.run_sync(pool.take, [])
    gc.collect()
    assert address not in endpoint._registered
    assert memory() is None
    pool.close()


async def test_memory_is_released_when_no_thread_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, endpoint, pool, fetcher = made(tmp_path)
    monkeypatch.setattr(remote, "RELEASE_S", 0.05)
    (block,) = pool.take([BlockSpec(pool.name_of("a"), 1, SLOT_BYTES)])
    await fetcher.adopt(block.address, block.size_bytes)
    limiter = anyio.to_thread.current_default_thread_limiter()
    tokens = limiter.total_tokens
    limiter.total_tokens = 1
    limiter.acquire_on_behalf_of_nowait(engine)
    try:
        await fetcher.release(block.address)
    finally:
        limiter.release_on_behalf_of(engine)
        limiter.total_tokens = tokens
    await until(lambda: not fetcher.writing())
    assert endpoint._registered[block.address] == (SLOT_BYTES, 1), "the pool's own"
    pool.give_back([block])
    pool.close()
    assert block.address not in engine.known


async def test_release_leaves_alone_what_was_not_adopted(tmp_path: Path) -> None:
    engine, _, pool, fetcher = made(tmp_path)
    (block,) = pool.take([BlockSpec(pool.name_of("a"), 1, SLOT_BYTES)])
    await fetcher.release(block.address)
    assert block.address in engine.known
    pool.give_back([block])
    pool.close()


def test_registering_names_what_is_registered_there() -> None:
    engine = FakeEngine()
    endpoint = Endpoint(cast(object, engine), "127.0.0.1", "tcp")
    endpoint.register(0x1000, 0x2000)
    with pytest.raises(EndpointFailed, match=r"code -7; .*8,192 bytes at 0x1000, 1 times"):
        endpoint.register(0x2000, 0x2000)
    engine.refuses = True
    with pytest.raises(EndpointFailed, match="unregistering memory"):
        endpoint.unregister(0x1000)
    with pytest.raises(EndpointFailed, match="8,192 bytes at 0x1000, for good"):
        endpoint.register(0x1000, 0x2000)
