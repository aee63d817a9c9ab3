"""What a publisher takes of /dev/shm: two slots of its part's size, at no moment more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from weightbus.bus.connection import Bus
from weightbus.producers.publisher import open_publisher
from weightbus.producers.shards import Part, plan_part
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES

pytestmark = pytest.mark.anyio

MIB = 2**20
LOOK_S = 0.001


def part_of(size_bytes: int, dtype: torch.dtype | None = None) -> Part:
    return plan_part({"w": torch.ones(size_bytes // 4)}, dtype=dtype)


def slots_of(*parts: Part) -> int:
    return sum(SHM_HEADER_BYTES + part.layout.segments[0].size_bytes for part in parts)


def taken(model: str) -> int:
    """As it is allocated; a block that goes meanwhile counts nothing."""
    total = 0
    for path in Path("/dev/shm").glob(f"weightbus-{model}.*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@contextmanager
def watching(model: str) -> Iterator[list[int]]:
    seen, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            seen.append(taken(model))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


async def test_two_slots_are_all_that_is_taken_while_versions_follow_each_other(
    bus: Bus, model: str
) -> None:
    part = part_of(16 * MIB)
    with watching(model) as seen:
        async with open_publisher(bus, model) as publisher:
            for version in range(1, 6):
                await publisher.publish(part, version)
            assert taken(model) == slots_of(part, part)
    assert max(seen) == slots_of(part, part)
    assert taken(model) == 0


async def test_old_block_goes_before_a_larger_one_is_made(bus: Bus, model: str) -> None:
    small, large = part_of(8 * MIB), part_of(24 * MIB)
    with watching(model) as seen:
        async with open_publisher(bus, model) as publisher:
            for version, part in enumerate((small, small, large, large)):
                await publisher.publish(part, version)
    assert max(seen) == slots_of(large, large)


async def test_slots_are_as_small_as_what_is_cast_to(bus: Bus, model: str) -> None:
    async with open_publisher(bus, model) as publisher:
        for version in (1, 2):
            await publisher.publish(part_of(16 * MIB, torch.bfloat16), version)
        assert taken(model) == 2 * (SHM_HEADER_BYTES + 8 * MIB)
