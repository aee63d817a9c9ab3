"""Device lanes of several engines and hosts: each worker fills its own, and reads those of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.integration.broadcast.device_fleet import (
    BUCKET_BYTES,
    DeviceFleet,
    open_device_fleet,
)
from tests.unit.planning.worlds import box_of, make_world
from tests.unit.transfer.reading import Held
from weightbus.consumers.planning.buckets import plan_buckets
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES

pytestmark = pytest.mark.anyio

SEED = 317
Host = Sequence[tuple[str, int]]
FLEETS: Sequence[Sequence[Host]] = (
    ([("a", 1)],),
    ([("a", 1), ("b", 1)],),
    ([("a", 2), ("b", 2)],),
    ([("a", 1)], [("b", 1)]),
    ([("a", 2)], [("b", 1)]),
    ([("a", 1), ("b", 1)], [("c", 1), ("d", 1)]),
    ([("a", 2), ("b", 2)], [("c", 2), ("d", 2)]),
    ([("a", 1)], [("b", 2)], [("c", 1)]),
)


def named(fleet: Sequence[Host]) -> str:
    return "+".join("".join(f"{name}{ranks}" for name, ranks in host) for host in fleet)


def check_held(fleet: DeviceFleet, held: Held) -> None:
    """All of the checkpoint, bit by bit."""
    world, total = fleet.world, 0
    for (tensor, starts, sizes), data in held.items():
        box = [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        assert data == box_of(world.tensors[tensor], world.layout.tensors[tensor], box).tobytes()
        total += len(data)
    assert total == sum(tensor.size for tensor in world.tensors)


def check_all(fleet: DeviceFleet, *names: str) -> None:
    for name in names or fleet.sites:
        engine = fleet.sites[name].engine
        assert set(engine.held) == set(range(engine.ranks))
        for held in engine.held.values():
            check_held(fleet, held)


@pytest.mark.parametrize("hosts", FLEETS, ids=named)
async def test_every_byte_reaches_every_rank_and_groups_are_kept(
    hosts: Sequence[Host], tmp_path: Path
) -> None:
    with open_device_fleet(make_world(SEED), hosts, tmp_path) as fleet:
        lanes = len(fleet.plan(1).groups)
        buckets = plan_buckets(fleet.world.layout, BUCKET_BYTES, lanes).buckets
        assert buckets > 2 or lanes > 2, "the world is too small to tell"
        for version in (1, 2, 3):
            outcomes = await fleet.run(fleet.plan(version, groups_of=1 if version > 1 else None))
            assert outcomes == dict.fromkeys(fleet.sites), outcomes
            check_all(fleet)
        for site in fleet.sites.values():
            assert site.pauses == 3
            owned = len(site.groups.ids)
            assert site.pool.total_bytes == owned * SHM_HEADER_BYTES, "only words in main memory"
            assert site.engine.prepared == 3 * site.engine.ranks


@pytest.mark.parametrize("hosts", FLEETS, ids=named)
@pytest.mark.parametrize("slots", [1, 3])
async def test_what_workers_do_not_read_themselves_comes_through_the_blocks(
    hosts: Sequence[Host], slots: int, tmp_path: Path
) -> None:
    world = make_world(SEED)
    assert len(world.segments) > 1
    with open_device_fleet(world, hosts, tmp_path, slots=slots, files=[0]) as fleet:
        for version in (1, 2):
            outcomes = await fleet.run(fleet.plan(version))
            assert outcomes == dict.fromkeys(fleet.sites), outcomes
            check_all(fleet)
