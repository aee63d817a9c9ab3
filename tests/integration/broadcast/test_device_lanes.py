"""Device lanes of several engines and hosts: each worker fills its own, and reads those of all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from tests.integration.broadcast.device_fleet import (
    BUCKET_BYTES,
    PATIENT_S,
    DeviceFleet,
    lost,
    open_device_fleet,
)
from tests.unit.planning.worlds import box_of, make_world
from tests.unit.transfer.reading import Gate, Held
from weightbus.consumers.errors import ProofNeeded, RouteUnavailable, SegmentUnavailable
from weightbus.consumers.planning.buckets import plan_buckets
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES
from weightbus.schemas.worker import Relay, Stream

pytestmark = pytest.mark.anyio

SEED = 317
STALL_S = 1.5
"""Of a plan in which somebody stands still."""
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


def fail_at(fleet: DeviceFleet, name: str, failing: int, error: WeightBusError) -> None:
    """A worker of an engine fails, once, before it reads a bucket."""
    errors = [error]

    def before(rank: int, bucket: int) -> None:
        if (rank, bucket) == (0, failing) and errors:
            raise errors.pop()

    fleet.sites[name].engine.before = before


async def finishes(fleet: DeviceFleet, version: int) -> None:
    """Everybody takes the next plan's lanes, which are others."""
    outcomes = await fleet.run(fleet.plan(version))
    assert outcomes == dict.fromkeys(fleet.sites), outcomes
    check_all(fleet)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("hosts", [FLEETS[1], FLEETS[3], FLEETS[5]], ids=named)
async def test_others_know_whom_they_have_lost_when_a_worker_fails(
    hosts: Sequence[Host], failing: int, tmp_path: Path
) -> None:
    with open_device_fleet(make_world(SEED), hosts, tmp_path) as fleet:
        await finishes(fleet, 1)
        fail_at(fleet, "b", failing, SegmentUnavailable("x", "gone", "must be there"))
        outcomes = await fleet.run(fleet.plan(2, groups_of=1))
        causes = {name: lost(error) for name, error in outcomes.items()}
        assert causes == dict.fromkeys(fleet.sites, "PeerLost") | {"b": "SegmentUnavailable"}
        for name, site in fleet.sites.items():
            assert site.groups.ids == (), f"{name} keeps a group that is out of step"
        await finishes(fleet, 3)


@pytest.mark.parametrize("hosts", [FLEETS[1], FLEETS[3]], ids=named)
async def test_worker_is_named_that_stands_still_while_it_reads(
    hosts: Sequence[Host], tmp_path: Path
) -> None:
    with open_device_fleet(make_world(SEED), hosts, tmp_path) as fleet:
        await finishes(fleet, 1)
        fleet.stall_after(STALL_S)
        gate = Gate()
        fleet.sites["b"].engine.before = lambda rank, bucket: gate.pass_through()
        async with anyio.create_task_group() as tasks:
            plan, outcomes = fleet.plan(2, groups_of=1), dict[str, WeightBusError | None]()

            async def update(name: str) -> None:
                outcomes[name] = await fleet.update(fleet.sites[name], plan)

            tasks.start_soon(update, "b")
            await update("a")
            assert lost(outcomes["a"]) == "PeerLost"
            with anyio.move_on_after(3 * STALL_S):
                await anyio.sleep_forever()  # its consumer gives it up meanwhile
            gate.open()
        assert lost(outcomes["b"]) == "WorkerLost"
        fleet.stall_after(PATIENT_S)
        await finishes(fleet, 3)


async def test_worker_is_named_that_stands_still_in_a_broadcast(tmp_path: Path) -> None:
    """Both members are ready for it, and both stand still: only one answers."""
    with open_device_fleet(make_world(SEED), FLEETS[3], tmp_path) as fleet:
        await finishes(fleet, 1)
        fleet.stall_after(STALL_S)
        gate = Gate()
        fleet.sites["b"].engine.rings[0].before = gate.pass_through
        async with anyio.create_task_group() as tasks:
            plan, outcomes = fleet.plan(2, groups_of=1), dict[str, WeightBusError | None]()

            async def update(name: str) -> None:
                outcomes[name] = await fleet.update(fleet.sites[name], plan)

            tasks.start_soon(update, "b")
            await update("a")
            assert lost(outcomes["a"]) == "PeerLost"
            with anyio.move_on_after(3 * STALL_S):
                await anyio.sleep_forever()  # its consumer gives it up meanwhile
            gate.open()
        assert lost(outcomes["b"]) == "WorkerLost"
        fleet.stall_after(PATIENT_S)
        await finishes(fleet, 3)


@pytest.mark.parametrize("hosts", [FLEETS[1], FLEETS[3], FLEETS[5]], ids=named)
@pytest.mark.parametrize("failing", [0, 1])
async def test_others_go_on_when_one_engine_finds_that_it_cannot_stream(
    hosts: Sequence[Host], failing: int, tmp_path: Path
) -> None:
    """Its worker fills its lane to the end; then it takes the version by relay."""
    with open_device_fleet(make_world(SEED), hosts, tmp_path) as fleet:
        await finishes(fleet, 1)
        fail_at(fleet, "b", failing, ProofNeeded("parameter p", "it moved"))
        outcomes = await fleet.run(fleet.plan(2, groups_of=1))
        assert outcomes == dict.fromkeys(fleet.sites), outcomes
        check_all(fleet)
        assert [type(feeds[0]) for feeds in fleet.sites["b"].engine.feeds] == [
            Stream,
            Stream,
            Relay,
        ]
        outcomes = await fleet.run(fleet.plan(3, groups_of=1))
        assert outcomes == dict.fromkeys(fleet.sites), "the groups have kept step"


async def test_next_versions_come_without_a_broadcast_when_workers_cannot_meet(
    tmp_path: Path,
) -> None:
    with open_device_fleet(make_world(SEED), FLEETS[3], tmp_path) as fleet:
        refusal = RouteUnavailable("broadcast", "there is no NCCL")
        fleet.sites["b"].engine.rings[0].refusal = refusal
        outcomes = await fleet.run(fleet.plan(1))
        assert {name: lost(error) for name, error in outcomes.items()} == {
            "a": "PeerLost",
            "b": "RouteUnavailable",
        }
        assert not fleet.sites["b"].route.is_favoured(2)
        assert {site.pauses for site in fleet.sites.values()} == {0}, "no engine was paused in vain"
        fleet.sites["b"].engine.rings[0].refusal = None
        await finishes(fleet, 2)
        assert fleet.sites["b"].route.is_favoured(3)


async def test_engine_that_is_not_on_gpus_takes_no_part(tmp_path: Path) -> None:
    with open_device_fleet(make_world(SEED), FLEETS[0], tmp_path) as fleet:
        fleet.sites["a"].engine.devices = ["cpu"]
        outcomes = await fleet.run(fleet.plan(1))
        assert lost(outcomes["a"]) == "RouteUnavailable"
        assert fleet.sites["a"].pauses == 0


async def test_lanes_lie_in_main_memory_when_the_plan_says_so(tmp_path: Path) -> None:
    """Of ranks on CPUs, and of whoever leads that knows of no others."""
    with open_device_fleet(make_world(SEED), FLEETS[5], tmp_path) as fleet:
        for version in (1, 2):
            outcomes = await fleet.run(fleet.plan(version, device=version == 2))
            assert outcomes == dict.fromkeys(fleet.sites), outcomes
            check_all(fleet)
