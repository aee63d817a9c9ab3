"""Engines on GPUs share what their links bring: replicas of one host, and virtual hosts by NCCL.

A virtual host maps what the trainer holds, as a host with a trainer of its own would: the version
is said again with the trainer's memory offered to each of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import pytest
from msgspec import structs

from tests.integration.fleet.elsewhere import BUDGETS, STALL_S, filler, routes_of
from tests.integration.fleet.fleet import Fleet, Follower
from tests.integration.fleet.log import DEADLINE_S
from tests.integration.fleet.processes import consumer_process
from tests.integration.fleet.signals import kill, stopped
from tests.integration.fleet.weights import weights_of
from weightbus.bus.connection import open_bus
from weightbus.bus.host import host_id
from weightbus.producers.publisher import Publisher, PublisherOptions, open_publisher
from weightbus.schemas.base import RouteName
from weightbus.schemas.placement import SharedMemorySegment
from weightbus.schemas.progress import UpdateFailed
from weightbus.schemas.rounds import RoundPlan

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

FILLER_BYTES = 640 * 2**20
"""So much that a version takes several buckets in every lane."""

BROADCAST: tuple[RouteName, ...] = ("broadcast",)
LOCAL: tuple[RouteName, ...] = ("local",)


class Part(NamedTuple):
    """One engine."""

    name: str
    host: str
    """Empty: this one."""
    first_gpu: int
    ranks: int = 1

    @property
    def host_id(self) -> str:
        return self.host or host_id()


REPLICAS = (Part("r0", "", 0), Part("r1", "", 1))
HOSTS = (Part("x0", "host-x", 0), Part("y1", "host-y", 1))
FLEETS = {
    "two replicas": REPLICAS,
    "three replicas on two GPUs": (*REPLICAS, Part("s0", "", 0)),
    "two hosts of one GPU": HOSTS,
    "three hosts of one GPU": (*HOSTS, Part("z2", "host-z", 2)),
    "two replicas of two GPUs": (Part("t01", "", 0, 2), Part("t23", "", 2, 2)),
    "two hosts of two GPUs": (Part("v01", "host-v", 0, 2), Part("w23", "host-w", 2, 2)),
    "two hosts of two replicas": (
        Part("x0", "host-x", 0),
        Part("x1", "host-x", 1),
        Part("y2", "host-y", 2),
        Part("y3", "host-y", 3),
    ),
    "two hosts of one GPU and of two": (Part("x0", "host-x", 0), Part("w12", "host-w", 1, 2)),
}


def gpus_of(parts: Sequence[Part]) -> int:
    return max(part.first_gpu + part.ranks for part in parts)


class Trainer:
    """Publishes versions that every virtual host can map."""

    def __init__(self, fleet: Fleet, publisher: Publisher, hosts: Sequence[str]) -> None:
        self._fleet, self._publisher, self._hosts = fleet, publisher, hosts

    async def publish(self) -> int:
        fleet = self._fleet
        version = fleet.next_version()
        tensors = weights_of(fleet.model, version) | {"filler": filler(FILLER_BYTES)}
        ready = await self._publisher.publish(tensors, version)
        placement = tuple(
            tuple(
                structs.replace(way, host_id=host)
                for way in ways
                if isinstance(way, SharedMemorySegment)
                for host in self._hosts
            )
            for ways in ready.placement
        )
        await fleet.say(structs.replace(ready, model=fleet.model, placement=placement))
        return version


@asynccontextmanager
async def training(fleet: Fleet, parts: Sequence[Part]) -> AsyncIterator[Trainer]:
    options = PublisherOptions(slot_wait_s=DEADLINE_S, linger_s=0.0)
    hosts = sorted({part.host_id for part in parts})
    async with (
        open_bus(fleet.settings) as bus,
        open_publisher(bus, f"{fleet.model}-trainer", options=options) as publisher,
    ):
        yield Trainer(fleet, publisher, hosts)


def settings_of(part: Part, routes: tuple[RouteName, ...]) -> dict[str, Any]:
    return {
        "ranks": part.ranks,
        "host_id": part.host_id,
        "routes": routes,
        "stall_s": STALL_S,
        "budgets": BUDGETS,
    }


@asynccontextmanager
async def following(
    fleet: Fleet, parts: Sequence[Part], routes: tuple[RouteName, ...] = BROADCAST
) -> AsyncIterator[tuple[Follower, ...]]:
    async with AsyncExitStack() as stack:
        followers = []
        for part in parts:
            settings = settings_of(part, routes)
            following = fleet.follow(part.name, first_gpu=part.first_gpu, **settings)
            followers.append(await stack.enter_async_context(following))
        yield tuple(followers)


async def prove(fleet: Fleet, trainer: Trainer, parts: Sequence[Part]) -> None:
    """The first version, which every engine reads in place; what comes after it can be streamed."""
    async with following(fleet, parts, LOCAL) as followers:
        version = await trainer.publish()
        for follower in followers:
            await follower.completes(version)


async def shared(fleet: Fleet, version: int, followers: Sequence[Follower]) -> RoundPlan:
    """See that a version reaches all of them by the lanes of their GPUs, bit for bit."""
    for follower in followers:
        assert (await follower.completes(version)).routes == BROADCAST
    plan = await fleet.log.wait(RoundPlan, version=version)
    assert plan.device, "its lanes lie in main memory"
    assert set(routes_of(plan).values()) == {"broadcast"}
    return plan


@pytest.mark.parametrize("name", FLEETS)
async def test_engines_hold_each_version_bit_for_bit_when_they_share_it(
    gpu_fleet: Fleet, gpus: Callable[[int], None], name: str
) -> None:
    parts = FLEETS[name]
    gpus(gpus_of(parts))
    async with training(gpu_fleet, parts) as trainer:
        await prove(gpu_fleet, trainer, parts)
        async with following(gpu_fleet, parts) as followers:
            groups = set()
            for _ in range(3):
                plan = await shared(gpu_fleet, await trainer.publish(), followers)
                groups.add(tuple(group.id for group in plan.groups))
            hosts = {part.host_id for part in parts}
            if len(hosts) > 1:
                assert len(groups) == 1, "groups are kept from version to version"
    assert gpu_fleet.log.said(UpdateFailed) == []


@pytest.mark.parametrize("name", ["three replicas on two GPUs", "three hosts of one GPU"])
async def test_survivors_finish_when_the_consumer_of_a_member_is_killed(
    gpu_fleet: Fleet, gpus: Callable[[int], None], name: str
) -> None:
    parts = FLEETS[name]
    gpus(gpus_of(parts))
    first, doomed, last = parts
    async with training(gpu_fleet, parts) as trainer:
        await prove(gpu_fleet, trainer, parts)
        async with following(gpu_fleet, [first, last]) as survivors:
            held = consumer_process(
                gpu_fleet, doomed.name, hold="before_apply", **settings_of(doomed, BROADCAST)
            )
            async with held as child:
                version = await trainer.publish()
                await child.hears("before_apply")
                await child.kill()
                for survivor in survivors:
                    await survivor.completes(version)
            await shared(gpu_fleet, await trainer.publish(), survivors)


@pytest.mark.parametrize("name", ["three replicas on two GPUs", "three hosts of one GPU"])
async def test_survivors_finish_when_the_worker_of_a_member_is_killed_while_it_reads(
    gpu_fleet: Fleet, gpus: Callable[[int], None], name: str
) -> None:
    parts = FLEETS[name]
    gpus(gpus_of(parts))
    async with training(gpu_fleet, parts) as trainer:
        await prove(gpu_fleet, trainer, parts)
        async with following(gpu_fleet, parts) as (first, doomed, last):
            hold = doomed.engine.hold("before_apply")
            version = await trainer.publish()
            await hold.reached.wait()
            pid = (await doomed.state()).pids[0]
            with stopped(pid):
                hold.release()
                kill(pid)
            for survivor in (first, last):
                await survivor.completes(version)
            await shared(gpu_fleet, await trainer.publish(), (first, last))
