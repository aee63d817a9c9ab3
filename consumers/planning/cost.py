"""What a route costs: seconds of every stage, from bytes and rates alone. Pure.

`docs/cost-model.md` derives every formula and works one example through. In short:

- Every stage has a time for each thing that limits it; the largest counts, and names the limit.
- What reads from one source at once shares its network, and so does what comes to one host.
- Through staging every byte of the layout comes by, whatever the ranks need of it: the digest is
  over all of them. Written into parameters is only what the ranks need.
- Stages overlap bucket by bucket: the slowest takes its whole time, the others that of one bucket.
  With one slot nothing overlaps, and the times add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from msgspec import Struct

from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import Links

__all__ = (
    "ASSUMED_LINKS",
    "CostStage",
    "RouteCost",
    "Site",
    "Situation",
    "StageCost",
    "assume",
    "predict",
)

ASSUMED_LINKS: Final = Links(
    memory=8 * 10**9,
    disk=10**9,
    network=1_250_000_000,
    broadcast=10**9,
    p2p=2 * 10**9,
)
"""Rates of a host that was not measured: memory of one ordinary socket, a SATA array, 10 Gbit/s."""

FORM_S: Final = 0.1
"""Groups that are not ready meet first: a store, and a device for each."""
FORM_MEMBER_S: Final = 0.005
"""And every member connects to every other."""

CostStage = Literal["form", "fetch", "broadcast", "reload"]


class Site(Struct, frozen=True, kw_only=True):
    """One engine's ranks on one host."""

    engine: str
    host: str
    ranks: int
    need_bytes: int
    """Written into parameters, over all ranks."""
    links: Links
    """Every rate above 0: `assume`."""
    tree: bool = False
    """Its groups send a broadcast on from member to member whole, as gloo does; NCCL's ring
    passes it on in pieces, so that its time does not grow with the members."""


class Situation(Struct, frozen=True, kw_only=True):
    """What all routes of a plan have in common."""

    layout_bytes: int
    source: Links
    """Of each host that offers the version; every rate above 0."""
    sources: int = 1
    """Hosts that offer the version, an equal part each."""
    bucket_bytes: int
    """Of one slot of one lane."""
    slots: int = 2
    ready: bool = False
    """The groups have met before."""
    files: bool = False
    """`local` reads files, not memory."""


class StageCost(Struct, frozen=True):
    """One stage of one engine, as if nothing else took time."""

    name: CostStage
    seconds: float
    bytes: int
    """That pass through it, on one host; 0 for `form`."""
    limit: str
    """What takes so long."""


class RouteCost(Struct, frozen=True, kw_only=True):
    """One engine's way."""

    route: RouteName
    stages: tuple[StageCost, ...]
    seconds: float
    """In all, stages overlapped."""
    buckets: int = 1
    """How many take part in the overlap."""
    card_bytes: int = 0
    """That every network card of the host takes in for this route."""
    lane_bytes: int = 0
    """That pass through one lane of staging."""

    @property
    def form_s(self) -> float:
        """Of `seconds`, what only the first version of a membership pays."""
        return sum(stage.seconds for stage in self.stages if stage.name == "form")

    @property
    def slowest(self) -> StageCost:
        """The stage that sets the pace."""
        return max(self.stages, key=lambda stage: stage.seconds)


def assume(links: Links, default: Links = ASSUMED_LINKS) -> Links:
    """`links` with the rates that were not measured taken from `default`."""
    return Links(
        memory=links.memory or default.memory,
        disk=links.disk or default.disk,
        network=links.network or default.network,
        broadcast=links.broadcast or default.broadcast,
        p2p=links.p2p or default.p2p,
        cards=links.cards,
    )


def predict(
    sites: Sequence[Site], routes: Mapping[str, RouteName], situation: Situation
) -> dict[str, RouteCost]:
    """The cost of every engine if all of them begin at once.

    Args:
        sites: the engines of a plan; an engine over several hosts is one site on each.
        routes: engine id -> its route.

    Returns:
        Engine id -> its cost; of an engine with several sites, that of the slowest one.
    """
    world = _World(sites, routes, situation)
    shared = world.broadcast() if world.members else None
    costs: dict[str, RouteCost] = {}
    for site in sites:
        match routes[site.engine]:
            case "local":
                cost = world.local(site)
            case "p2p":
                cost = world.p2p(site)
            case "broadcast":
                assert shared is not None, "there is a member, since this is one"
                cost = shared
        known = costs.get(site.engine)
        if known is None or cost.seconds > known.seconds:
            costs[site.engine] = cost
    return costs


class _World:
    """Who shares what."""

    def __init__(
        self, sites: Sequence[Site], routes: Mapping[str, RouteName], situation: Situation
    ) -> None:
        self._situation = situation
        self.members = [site for site in sites if routes[site.engine] == "broadcast"]
        self._written: dict[str, int] = {}
        """Host -> bytes that go into parameters there."""
        self._pulls: dict[str, int] = {}
        """Host -> how often the layout comes in by its network."""
        for site in sites:
            self._written[site.host] = self._written.get(site.host, 0) + site.need_bytes
            if routes[site.engine] == "p2p":
                self._pulls[site.host] = self._pulls.get(site.host, 0) + 1
        self._source_pulls = sum(self._pulls.values()) + bool(self.members)
        for host in {site.host for site in self.members}:
            self._pulls[host] = self._pulls.get(host, 0) + 1

    def local(self, site: Site) -> RouteCost:
        reload = self._reload(site)
        if not self._situation.files:
            return RouteCost(route="local", stages=(reload,), seconds=reload.seconds)
        size = self._situation.layout_bytes
        fetch = StageCost("fetch", size / site.links.disk, size, "its disk")
        return self._staged("local", (fetch, reload), site.ranks, 0)

    def p2p(self, site: Site) -> RouteCost:
        size = self._situation.layout_bytes
        fetch = _slowest(
            "fetch",
            size,
            {
                "the transfer engine": size / (site.ranks * site.links.p2p),
                "its host's network": self._incoming_s(site),
                "the source's network": self._source_s(),
            },
        )
        card_bytes = size // site.links.cards
        return self._staged("p2p", (fetch, self._reload(site)), site.ranks, card_bytes)

    def broadcast(self) -> RouteCost:
        """Of all members: the slowest host sets everyone's pace.

        While one slot of a lane is broadcast, the others are filled, each by another host.
        """
        size, members = self._situation.layout_bytes, self.members
        ranks: dict[str, int] = {}
        for site in members:
            ranks[site.host] = ranks.get(site.host, 0) + site.ranks
        hosts, lanes = len(ranks), max(ranks.values())
        own = size // hosts
        ahead = min(hosts, max(1, self._situation.slots - 1))
        p2p = min(site.links.p2p for site in members)
        readers = {
            "the transfer engine": size / (lanes * ahead * p2p),
            "the source's network": self._source_s(),
        }
        network_s = max(self._incoming_s(site) for site in members)
        stages = []
        if hosts == 1:
            readers["its host's network"] = network_s
        else:
            if not self._situation.ready:
                seconds = FORM_S + FORM_MEMBER_S * (hosts - 1)
                stages.append(StageCost("form", seconds, 0, "members that meet"))
        stages.append(_slowest("fetch", own, readers))
        if hosts > 1:
            tree = any(site.tree for site in members)
            hops = math.ceil(math.log2(hosts)) if tree else 1
            rate = lanes * min(site.links.broadcast for site in members) / hops
            limits = {"the process groups": size / rate, "a host's network": network_s}
            stages.append(_slowest("broadcast", size - own, limits))
        stages.append(max((self._reload(site) for site in members), key=_seconds))
        card_bytes = size // min(site.links.cards for site in members)
        return self._staged("broadcast", tuple(stages), lanes, card_bytes)

    def _source_s(self) -> float:
        source = self._situation.source
        rate = self._situation.sources * source.cards * source.network
        return self._source_pulls * self._situation.layout_bytes / rate

    def _incoming_s(self, site: Site) -> float:
        rate = site.links.cards * site.links.network
        return self._pulls[site.host] * self._situation.layout_bytes / rate

    def _reload(self, site: Site) -> StageCost:
        written = self._written[site.host]
        return StageCost("reload", written / site.links.memory, written, "its host's memory")

    def _staged(
        self, route: RouteName, stages: tuple[StageCost, ...], lanes: int, card_bytes: int
    ) -> RouteCost:
        """Stages that overlap, bucket by bucket."""
        situation = self._situation
        buckets = max(1, -(-situation.layout_bytes // (situation.bucket_bytes * lanes)))
        steps = [stage.seconds for stage in stages if stage.name != "form"]
        form_s = sum(stage.seconds for stage in stages if stage.name == "form")
        overlap = 1 if situation.slots == 1 else buckets
        seconds = form_s + max(steps) + (sum(steps) - max(steps)) / overlap
        return RouteCost(
            route=route,
            stages=stages,
            seconds=seconds,
            buckets=buckets,
            card_bytes=card_bytes,
            lane_bytes=-(-situation.layout_bytes // lanes),
        )


def _slowest(name: CostStage, size: int, limits: Mapping[str, float]) -> StageCost:
    limit = max(limits, key=limits.__getitem__)
    return StageCost(name, limits[limit], size, limit)


def _seconds(stage: StageCost) -> float:
    return stage.seconds
