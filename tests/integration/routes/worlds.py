"""What the conformance suite needs to know of a route: where its bytes are, who takes them, and how
it is planned.

A `World` publishes versions of one layout; its `Fleet` is what brings them to engines. In most
worlds every engine is on its own. In that of broadcast, engines of other hosts go along.
"""

from __future__ import annotations

import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from msgspec import structs

from tests.integration.routes.engine import DEADLINE_S, InProcessEngine
from tests.integration.routes.publisher import ADDRESS, Offer, PublisherProcess, running_publisher
from tests.unit.transfer.publishing import HOST, Kind, Trainer, open_trainer
from weightbus.bus.blocks import SHM_DIRECTORY, STAGE_PREFIX
from weightbus.bus.endpoint import open_endpoint
from weightbus.consumers.planning.groups import plan_groups, plan_lanes
from weightbus.consumers.transfer.broadcast import BroadcastRoute
from weightbus.consumers.transfer.fetch import LocalSegments
from weightbus.consumers.transfer.groups import Groups, open_meeting
from weightbus.consumers.transfer.local import LocalRoute
from weightbus.consumers.transfer.p2p import P2pRoute
from weightbus.consumers.transfer.route import Route
from weightbus.consumers.transfer.sources import Sources
from weightbus.consumers.transfer.staged import Staging
from weightbus.consumers.transfer.staging import BlockPool
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import (
    FileSegment,
    Placement,
    RemoteSegment,
    Segment,
    SharedMemorySegment,
)
from weightbus.schemas.rounds import EngineRoute, Join, RankOffer, RankRoute, RoundPlan

__all__ = (
    "ROUTES",
    "BroadcastWorld",
    "LocalWorld",
    "OpenWorld",
    "P2pWorld",
    "Publishers",
    "Shape",
    "Site",
    "World",
)

STALL_S = 10.0
"""Nobody in these tests stands still for so long, unless the machine does."""

STAGING_BYTES = 2**20
"""Most that one engine's staging may take."""

Tensors = Mapping[str, torch.Tensor]

_COMPANIONS: Mapping[int, Sequence[tuple[str, int, int]]] = {
    1: [("x", 2, 1)],
    2: [("x", 1, 1), ("y", 1, 1), ("z", 3, 2)],
    3: [("x", 1, 1), ("y", 2, 2)],
}
"""Ranks of an engine on the first host -> name, ranks and host of those that go along."""


@dataclass(frozen=True)
class Shape:
    """Of staging."""

    bucket_bytes: int = 2048
    slots: int = 2


@dataclass(frozen=True, eq=False)
class Site:
    """One engine, its host, and the routes that its consumer has."""

    engine: InProcessEngine
    host_id: str
    route: Route
    """What is tested."""
    alone: Route
    """What brings a version that the engine cannot stream."""


class Publishers:
    """Processes that publish; those that died are replaced."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._running: list[PublisherProcess] = []

    def get(self, count: int) -> list[PublisherProcess]:
        self._running = [one for one in self._running if one.is_alive]
        while len(self._running) < count:
            self._running.append(self._stack.enter_context(running_publisher()))
        return self._running[:count]

    def close(self) -> None:
        self._stack.close()


class World(ABC):
    """One trainer and one route."""

    staged: ClassVar[bool] = True
    """Whether a proven engine is streamed to."""

    def __init__(self, trainer: Trainer, shape: Shape, stack: ExitStack) -> None:
        self.trainer, self.shape = trainer, shape
        self.model = f"test-{uuid.uuid4().hex[:8]}"
        self.stack = stack
        self.sites: list[Site] = []
        self._epoch = 0
        stack.callback(self._check_clean)

    @abstractmethod
    def publish(self, tensors: Tensors, version: int) -> Placement:
        """The trainer's next version; the one before may be overwritten."""

    @abstractmethod
    def overwrite(self, version: int) -> None:
        """The trainer publishes on without waiting for readers."""

    @abstractmethod
    def lose_source(self, version: int) -> None:
        """Where the version was, nothing can be opened any more."""

    @abstractmethod
    def open_site(self, name: str, ranks: int, host: int) -> Site:
        """Another engine, on the host of that number."""

    @abstractmethod
    def strange(self) -> list[tuple[Segment, str]]:
        """Segments that cannot be reached, and why."""

    def sites_of(self, ranks: Sequence[int]) -> list[Site]:
        """Engines under test, and those that their transfers need."""
        return [self.add_site("abc"[number], count, 0) for number, count in enumerate(ranks)]

    def add_site(self, name: str, ranks: int, host: int) -> Site:
        site = self.open_site(name, ranks, host)
        self.stack.callback(site.engine.close)
        self.sites.append(site)
        return site

    def plan(
        self, sites: Sequence[Site], proven: Sequence[bool], version: int
    ) -> list[tuple[Route, RoundPlan]]:
        """For every engine, its route and the plan that it runs."""
        self._epoch += 1
        return [(site.route, self.plan_of([site], site.route, version)) for site in sites]

    def plan_of(self, sites: Sequence[Site], route: Route, version: int) -> RoundPlan:
        """Without groups."""
        return RoundPlan(
            model=self.model,
            version=version,
            round=f"v{version}",
            epoch=self._epoch,
            leader=sites[0].engine.name,
            engines=tuple(
                EngineRoute(
                    engine=site.engine.name,
                    ranks=tuple(
                        RankRoute(rank=rank, route=route.name) for rank in range(site.engine.ranks)
                    ),
                )
                for site in sites
            ),
            bucket_bytes=self.shape.bucket_bytes,
            slots=self.shape.slots,
        )

    def open_staging(self, name: str) -> Staging:
        pool = BlockPool(f"{self.model}.{name}", STAGING_BYTES)
        self.stack.callback(pool.close)
        return Staging(pool, STALL_S)

    def open_local(self, host_id: str) -> LocalSegments:
        local = LocalSegments(host_id, self.trainer.roots)
        self.stack.callback(local.close)
        return local

    def _check_clean(self) -> None:
        left = [path.name for path in SHM_DIRECTORY.glob(f"{STAGE_PREFIX}{self.model}.*")]
        assert not left, "staging is left behind"


class LocalWorld(World):
    """The trainer is on the engines' host."""

    staged = False

    def publish(self, tensors: Tensors, version: int) -> Placement:
        return tuple((segment,) for segment in self.trainer.publish(tensors, version))

    def overwrite(self, version: int) -> None:
        if self.trainer.kind == "memory":
            for block in self.trainer.blocks:
                block.generation += 2
        else:
            for number in range(len(self.trainer.layout.segments)):
                os.utime(self.trainer.path(number, version), ns=(version, version))

    def lose_source(self, version: int) -> None:
        self.path(-1, version).unlink()

    def path(self, number: int, version: int) -> Path:
        """Where a segment is."""
        if self.trainer.kind == "memory":
            return self.trainer.blocks[number].path
        return self.trainer.path(range(len(self.trainer.layout.segments))[number], version)

    def open_site(self, name: str, ranks: int, host: int) -> Site:
        staging = self.open_staging(name) if self.staged else None
        route = LocalRoute(HOST, self.trainer.roots, staging)
        return Site(InProcessEngine(name, ranks, self.trainer.roots), HOST, route, route)

    def strange(self) -> list[tuple[Segment, str]]:
        return [
            (FileSegment(path=self.trainer.roots[0] + "/absent"), "No such file"),
            (FileSegment(path="/proc/self/status"), "must lie below"),
            (
                SharedMemorySegment(name="weightbus-x", host_id="other", generation=2),
                "must be on this one",
            ),
        ]


class StagedWorld(LocalWorld):
    """As `LocalWorld`, but files go through staging."""

    staged = True


class RemoteWorld(World):
    """The trainer's ranks are spread over two processes, whose memory is read from other hosts."""

    host_ids: ClassVar[Sequence[str]]

    def __init__(
        self, trainer: Trainer, shape: Shape, stack: ExitStack, publishers: Publishers
    ) -> None:
        super().__init__(trainer, shape, stack)
        self.endpoint = stack.enter_context(open_endpoint(ADDRESS))
        self._publishers = publishers
        self._running: list[PublisherProcess] = []

    def publish(self, tensors: Tensors, version: int) -> Placement:
        self.trainer.publish(tensors, version)  # files that the processes read
        self._start()
        ways: dict[int, tuple[Segment, ...]] = {}
        for process, numbers in self._shares():
            paths = [self.trainer.path(number, version) for number in numbers]
            for number, offer in zip(numbers, process.write(paths), strict=True):
                ways[number] = self.ways(offer)
        return tuple(ways[number] for number in sorted(ways))

    def ways(self, offer: Offer) -> tuple[Segment, ...]:
        return offer.near(HOST), offer.far()

    def overwrite(self, version: int) -> None:
        for process, _ in self._shares():
            process.write()

    def lose_source(self, version: int) -> None:
        self._running[-1].kill()

    def open_site(self, name: str, ranks: int, host: int) -> Site:
        host_id = self.host_ids[host]
        staging, local = self.open_staging(name), self.open_local(host_id)
        alone = P2pRoute(self.endpoint, staging, local, host_id, receiver=name)
        route = self.open_route(name, host_id, staging, local) or alone
        return Site(InProcessEngine(name, ranks, (), host_id), host_id, route, alone)

    def open_route(
        self, name: str, host_id: str, staging: Staging, local: LocalSegments
    ) -> Route | None:
        """None: it is p2p."""
        return None

    def strange(self) -> list[tuple[Segment, str]]:
        nobody = RemoteSegment(
            protocol=self.endpoint.protocol, session=f"{ADDRESS}:1", address=8192, generation=2
        )
        other = RemoteSegment(protocol="rdma", session=f"{ADDRESS}:1", address=8192, generation=2)
        return [
            (nobody, "not readable"),
            (other, "offered by rdma"),
            (
                SharedMemorySegment(name="weightbus-x", host_id="other", generation=2),
                "must be on this one",
            ),
        ]

    def _start(self) -> None:
        """Have processes with segments, and new ones if they are gone."""
        if self._running and all(process.is_alive for process in self._running):
            return
        self._running = self._publishers.get(min(2, len(self.trainer.layout.segments)))
        for process, numbers in self._shares():
            process.open([self.trainer.layout.segments[n].size_bytes for n in numbers])

    def _shares(self) -> list[tuple[PublisherProcess, range]]:
        count, step = len(self.trainer.layout.segments), len(self._running)
        return [(process, range(n, count, step)) for n, process in enumerate(self._running)]


class P2pWorld(RemoteWorld):
    """Engines on a host that shares nothing with the trainer's."""

    host_ids = ("host-1",)


class BroadcastWorld(RemoteWorld):
    """Up to three hosts; the first is the trainer's, and reads its memory."""

    host_ids = (HOST, "host-1", "host-2")

    def __init__(
        self, trainer: Trainer, shape: Shape, stack: ExitStack, publishers: Publishers
    ) -> None:
        super().__init__(trainer, shape, stack, publishers)
        self._consumers: dict[str, str] = {}

    def sites_of(self, ranks: Sequence[int]) -> list[Site]:
        """One engine alone gets others on two hosts; of two or three, each has a host."""
        sites = [self.add_site("abc"[n], count, n) for n, count in enumerate(ranks)]
        if len(ranks) == 1:
            for name, count, host in _COMPANIONS[ranks[0]]:
                sites.append(self.add_site(name, count, host))
        return sites

    def open_route(
        self, name: str, host_id: str, staging: Staging, local: LocalSegments
    ) -> Route | None:
        groups = Groups(ADDRESS)
        self.stack.callback(groups.close, DEADLINE_S)
        meeting = self.stack.enter_context(open_meeting(ADDRESS))
        self._consumers[name] = uuid.uuid4().hex
        sources = Sources(local, host_id, endpoint=self.endpoint, receiver=name)
        return BroadcastRoute(name, sources, staging, groups, meeting)

    def plan(
        self, sites: Sequence[Site], proven: Sequence[bool], version: int
    ) -> list[tuple[Route, RoundPlan]]:
        """Who cannot stream yet takes the version alone, as a leader would have it."""
        self._epoch += 1
        plans = {site: (site.alone, self.plan_of([site], site.alone, version)) for site in sites}
        together = [site for site, ready in zip(sites, proven, strict=True) if ready]
        if together:
            joins = [self._join(site, version) for site in together]
            groups = plan_groups(
                plan_lanes(joins), {join.engine: join for join in joins}, self._epoch
            ).groups
            bare = self.plan_of(together, together[0].route, version)
            plan = structs.replace(bare, groups=groups)
            plans |= {site: (site.route, plan) for site in together}
        return [plans[site] for site in sites]

    def _join(self, site: Site, version: int) -> Join:
        name = site.engine.name
        return Join(
            model=self.model,
            version=version,
            round=f"v{version}",
            engine=name,
            consumer=self._consumers[name],
            host_id=site.host_id,
            ranks=tuple(
                RankOffer(rank=r, needs_digest="0" * 64, need_bytes=0, routes=("broadcast",))
                for r in range(site.engine.ranks)
            ),
            rendezvous=site.route.rendezvous,
            groups=site.route.groups,
        )


OpenWorld = Callable[[Layout, Path, Publishers, Shape], AbstractContextManager[World]]


def _open_local(world: type[LocalWorld], kind: Kind) -> OpenWorld:
    @contextmanager
    def opened(
        layout: Layout, directory: Path, publishers: Publishers, shape: Shape
    ) -> Iterator[World]:
        with open_trainer(layout, kind, directory) as trainer, ExitStack() as stack:
            yield world(trainer, shape, stack)

    return opened


def _open_remote(world: type[RemoteWorld]) -> OpenWorld:
    @contextmanager
    def opened(
        layout: Layout, directory: Path, publishers: Publishers, shape: Shape
    ) -> Iterator[World]:
        with open_trainer(layout, "files", directory) as trainer, ExitStack() as stack:
            yield world(trainer, shape, stack, publishers)

    return opened


ROUTES: Mapping[str, OpenWorld] = {
    "local-memory": _open_local(LocalWorld, "memory"),
    "local-files": _open_local(LocalWorld, "files"),
    "local-staged": _open_local(StagedWorld, "files"),
    "p2p": _open_remote(P2pWorld),
    "broadcast": _open_remote(BroadcastWorld),
}
"""Every route, and for `local` every way that it reads."""
