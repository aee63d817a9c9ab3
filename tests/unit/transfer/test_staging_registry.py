"""Blocks are registered once, when they are made, and forgotten when they go: not in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightbus.bus.errors import EndpointFailed, SharedMemoryUnavailable
from weightbus.consumers.transfer.staging import BlockPool, BlockSpec
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES

SLOT_BYTES = 8192
ONE_BYTES = SLOT_BYTES + SHM_HEADER_BYTES


class Registry:
    """What is registered, and how often that has changed."""

    def __init__(self) -> None:
        self.known: dict[int, int] = {}
        self.changes = 0
        self.refuses = False

    def register(self, address: int, size_bytes: int) -> None:
        if self.refuses:
            raise EndpointFailed("registering memory", f"{size_bytes} bytes", "code 1")
        self.changes += 1
        self.known[address] = size_bytes

    def unregister(self, address: int) -> None:
        self.changes += 1
        del self.known[address]


def registered_pool(tmp_path: Path, max_bytes: int = 0) -> tuple[BlockPool, Registry]:
    pool, registry = BlockPool("m.e", max_bytes, tmp_path), Registry()
    pool.register_with(registry)
    return pool, registry


def spec(pool: BlockPool, name: str, slots: int = 1) -> BlockSpec:
    return BlockSpec(pool.name_of(name), slots, SLOT_BYTES)


def test_block_is_registered_once_however_many_versions_use_it(tmp_path: Path) -> None:
    pool, registry = registered_pool(tmp_path)
    for _ in range(5):
        (block,) = pool.take([spec(pool, "a")])
        assert registry.known == {block.address: SLOT_BYTES}
        pool.give_back([block])
    assert registry.changes == 1
    pool.close()
    assert registry.known == {}


def test_condemned_block_is_forgotten_when_nothing_writes_to_it_any_more(tmp_path: Path) -> None:
    pool, registry = registered_pool(tmp_path)
    writing = [True]
    (block,) = pool.take([spec(pool, "a")])
    pool.condemn([block], lambda: writing[0])
    pool.give_back(pool.take([spec(pool, "b")]))
    assert len(registry.known) == 2, "it is written to"
    writing[0] = False
    pool.give_back(pool.take([spec(pool, "b")]))
    assert len(registry.known) == 1
    assert block.address not in registry.known
    pool.close()


def test_memory_of_condemned_blocks_is_room_again_when_it_is_needed(tmp_path: Path) -> None:
    pool, registry = registered_pool(tmp_path, ONE_BYTES)
    for name in "abc":
        blocks = pool.take([spec(pool, name)])
        pool.condemn(blocks, lambda: False)
        assert pool.room_bytes == ONE_BYTES
    pool.give_back(pool.take([spec(pool, "d")]))
    pool.give_back(pool.take([spec(pool, "e")]))
    assert len(registry.known) == 1
    pool.close()


def test_block_is_forgotten_when_it_is_made_anew_in_another_size(tmp_path: Path) -> None:
    pool, registry = registered_pool(tmp_path)
    pool.give_back(pool.take([spec(pool, "a")]))
    pool.give_back(pool.take([spec(pool, "a", 2)]))
    assert list(registry.known.values()) == [2 * SLOT_BYTES]
    pool.close()


def test_no_block_is_taken_when_it_cannot_be_registered(tmp_path: Path) -> None:
    pool, registry = registered_pool(tmp_path)
    registry.refuses = True
    with pytest.raises(SharedMemoryUnavailable, match="registering memory"):
        pool.take([spec(pool, "a")])
    assert not list(tmp_path.iterdir())
    assert pool.total_bytes == 0
    pool.close()
