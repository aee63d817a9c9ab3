"""What a route costs: seconds of every stage, from bytes and rates alone. Pure.

`docs/cost-model.md` derives every formula and works one example through. In short:

- Every stage has a time for each thing that limits it; the largest counts, and names the limit.
- What reads from one source at once shares its network and its transfer engine, and so does what
  comes to one host. All lanes of a consumer go through its one transfer engine.
- Through staging every byte of the layout comes by, whatever the ranks need of it: the digest is
  over all of them. Written into parameters is only what the ranks need.
- Every GPU has a link of its own to the host's memory, and reads what other GPUs of its host hold
  at the rate of its peers. Through lanes in memory of GPUs every byte takes such a link once.
- Stages overlap bucket by bucket. A slot is held from fetch to reload: `S` slots let `S` buckets
  be under way, and the pace is that of the slowest stage, or of the slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

from msgspec import Struct, structs

from weightbus.consumers.planning.cuts import count_buckets
from weightbus.consumers.planning.source import SourceMemory
from weightbus.consumers.planning.staging import StagingSize
from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import Links

__all__ = (
    "ASSUMED_LINKS",
    "BUCKET_S",
    "CostStage",
    "DEVICE_BUCKET_S",
    "GATHER_SHARE",
    "GROUP_MEMBER_S",
    "GROUP_S",
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
    device=55 * 10**9,
    peer=390 * 10**9,
)
"""Rates of a host that was not measured: memory of one ordinary socket, a SATA array, 10 Gbit/s. Of
GPUs those that were measured on H200s: a copy from pinned memory by PCIe 5 x16, and one from a peer
by NVLink 4. That a GPU reads so much while its peers read as much of it is assumed."""

GATHER_SHARE: Final = 0.9
"""Of `Links.device`, what the gather kernel reads of host memory: 50 of 55.6 GB/s on an H200."""

GROUP_S: Final = 0.1
"""Groups that are not ready meet first: a store, and a device for each. Assumed, not measured."""
GROUP_MEMBER_S: Final = 0.005
"""And every member connects to every other. Assumed."""

BUCKET_S: Final = 0.0005
"""Fetching or broadcasting one bucket, however small: a batch of reads or the members' agreement,
and looking whether there is room. Assumed: who waits for room looks every 0.1 to 1 ms."""

DEVICE_BUCKET_S: Final = 0.0001
"""The same, if the workers of one host fill lanes in memory of GPUs: copies are queued ahead, and
nobody agrees with anybody. Assumed."""

CostStage = Literal["form", "fetch", "broadcast", "reload"]


class Site(Struct, frozen=True, kw_only=True):
    """One engine's ranks on one host."""

    engine: str
    host: str
    ranks: int
    need_bytes: int
    """Written into parameters, over all ranks."""
    rank_bytes: int = 0
    """Of them, into those of its busiest rank; it matters for GPUs."""
    gpus: bool = False
    """Every rank has one."""
    near: bool = False
    """It can read the version in memory of its host."""
    links: Links
    """Every rate above 0: `assume`."""
    staging: StagingSize
    """Of each of its lanes."""
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
    ready: bool = False
    """The groups have met before."""
    files: bool = False
    """`local` reads files, not memory."""
    memory: SourceMemory = "other"
    """That `local` reads."""
    device: bool = False
    """Lanes of the broadcast lie in memory of its members' GPUs."""


class StageCost(Struct, frozen=True):
    """One stage of one engine, for the whole version, bucket after bucket."""

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
    pace_s: float
    """What the whole version would take if all buckets were under way at once."""
    limit: str
    """What sets this pace."""
    buckets: int = 1
    """How many take part in the overlap."""
    card_bytes: int = 0
    """That every network card of the host takes in for this route."""
    lane_bytes: int = 0
    """That pass through staging of its busiest rank."""

    @property
    def form_s(self) -> float:
        """Of `seconds`, what only the first version of a membership pays."""
        return sum(stage.seconds for stage in self.stages if stage.name == "form")


def assume(links: Links, default: Links = ASSUMED_LINKS) -> Links:
    """`links` with the rates that were not measured taken from `default`."""
    return Links(
        memory=links.memory or default.memory,
        disk=links.disk or default.disk,
        network=links.network or default.network,
        broadcast=links.broadcast or default.broadcast,
        p2p=links.p2p or default.p2p,
        device=links.device or default.device,
        peer=links.peer or default.peer,
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
                cost = world.as_member(shared, site)
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
        self._copied: dict[str, int] = {}
        """Of them, those that no GPU gathers."""
        self._pulls: dict[str, int] = {}
        """Host -> engines there that pull the layout."""
        self._readers: dict[str, int] = {}
        """Host -> engines there that read files."""
        self._ranks: dict[str, int] = {}
        """Host -> ranks there that take the broadcast."""
        for site in sites:
            route, host = routes[site.engine], site.host
            self._written[host] = self._written.get(host, 0) + site.need_bytes
            copied = 0 if site.gpus else site.need_bytes
            self._copied[host] = self._copied.get(host, 0) + copied
            if route == "p2p":
                self._pulls[host] = self._pulls.get(host, 0) + 1
            elif route == "local":
                self._readers[host] = self._readers.get(host, 0) + 1
            else:
                self._ranks[host] = self._ranks.get(host, 0) + site.ranks
        self._lanes = max(self._ranks.values(), default=0)
        far = {site.host for site in self.members if not self._fills_itself(site)}
        self._source_pulls = sum(self._pulls.values()) + len(far) / max(1, len(self._ranks))
        self._receivers = set(self._ranks) if far or len(self._ranks) > 1 else set[str]()
        """Hosts that take in what others send, for the broadcast."""

    def local(self, site: Site) -> RouteCost:
        reload = self._reload(site, of_gpus=self._situation.memory == "gpus")
        if not self._situation.files:
            seconds = reload.seconds
            return RouteCost(
                route="local",
                stages=(reload,),
                seconds=seconds,
                pace_s=seconds,
                limit=f"{reload.limit} in reload",
            )
        size = self._situation.layout_bytes
        buckets = self._buckets(site.staging, site.ranks)
        times = {"its host's disk": self._readers[site.host] * size / site.links.disk}
        fetch = _slowest("fetch", size, times, buckets)
        cost = _overlapped("local", (fetch, reload), buckets, site.staging.slots)
        return structs.replace(cost, lane_bytes=-(-size // site.ranks))

    def p2p(self, site: Site) -> RouteCost:
        size = self._situation.layout_bytes
        buckets = self._buckets(site.staging, site.ranks)
        times = {
            "its transfer engine": size / site.links.p2p,
            "its host's network": self._incoming_s(site, site.host in self._receivers),
            **self._source_s(),
        }
        fetch = _slowest("fetch", size, times, buckets)
        cost = _overlapped("p2p", (fetch, self._reload(site)), buckets, site.staging.slots)
        return structs.replace(
            cost, lane_bytes=-(-size // site.ranks), card_bytes=size // site.links.cards
        )

    def broadcast(self) -> RouteCost:
        """Of all members: the slowest host sets everyone's pace."""
        members, size = self.members, self._situation.layout_bytes
        hosts = len(self._ranks)
        own = size // hosts
        staging = StagingSize(
            bucket_bytes=min(site.staging.bucket_bytes for site in members),
            slots=min(site.staging.slots for site in members),
        )
        buckets = self._buckets(staging, self._lanes)
        tree = any(site.tree or (site.gpus and not self._situation.device) for site in members)
        hops = math.ceil(math.log2(hosts)) if tree else int(hosts > 1)
        network_s = max(self._incoming_s(site, max(1, hops)) for site in members)
        shared, bucket_s = self._source_s(), BUCKET_S
        if all(map(self._fills_itself, members)):
            shared = {}
            bucket_s = DEVICE_BUCKET_S if hosts == 1 else BUCKET_S
        elif hosts == 1:
            shared["its host's network"] = network_s
        parts = self._parts_s(lambda lanes: -(-lanes // hosts))
        fetch = _slowest("fetch", own, {**parts, **shared}, buckets, bucket_s)
        stages = [fetch]
        if hosts > 1:
            groups_s = max(
                size * self._share(site) * hops / site.links.broadcast for site in members
            )
            times = {"the process groups": groups_s, "a host's network": network_s}
            stages.append(_slowest("broadcast", size - own, times, buckets))
        reloads = (self._reload(site, of_gpus=self._situation.device) for site in members)
        stages.append(max(reloads, key=_seconds))
        among = {**self._parts_s(lambda lanes: lanes / hosts), **shared}
        in_turn = self._situation.device and hosts == 1
        cost = _overlapped(
            "broadcast", tuple(stages), buckets, staging.slots, None if in_turn else among
        )
        if hosts == 1 or self._situation.ready:
            return cost
        form = StageCost("form", GROUP_S + GROUP_MEMBER_S * (hosts - 1), 0, "members that meet")
        return structs.replace(
            cost, stages=(form, *cost.stages), seconds=form.seconds + cost.seconds
        )

    def as_member(self, shared: RouteCost, site: Site) -> RouteCost:
        size = self._situation.layout_bytes
        received = size if site.host in self._receivers else 0
        return structs.replace(
            shared,
            card_bytes=received // site.links.cards,
            lane_bytes=math.ceil(size * self._share(site)),
        )

    def _fills_itself(self, site: Site) -> bool:
        """Whether workers of a member copy its parts from memory of their host to their GPUs."""
        return self._situation.device and site.near

    def _share(self, site: Site) -> float:
        """Of all bytes, what the busiest rank of a host of the broadcast stages."""
        return self._rank_lanes(site) / self._lanes

    def _rank_lanes(self, site: Site) -> int:
        """Lanes that the busiest rank of a host stages."""
        return -(-self._lanes // self._ranks[site.host])

    def _engine_lanes(self, site: Site) -> int:
        """Lanes that one engine of a host stages."""
        return min(self._lanes, site.ranks * self._rank_lanes(site))

    def _parts_s(self, at_once: Callable[[int], float]) -> dict[str, float]:
        """Seconds in which the slowest host fetches its parts of all buckets, by what limits it.

        Args:
            at_once: of so many lanes, how many are fetched by one thing at a time.
        """
        times: dict[str, float] = {}

        def limit(name: str, lanes: int, rate: int) -> None:
            part_s = self._situation.layout_bytes * at_once(lanes) / (self._lanes * rate)
            times[name] = max(times.get(name, 0.0), part_s)

        for site in self.members:
            if not self._fills_itself(site):  # its consumer's transfer engine does
                limit("a transfer engine", self._engine_lanes(site), site.links.p2p)
            if self._situation.device:
                limit("a GPU's link to its host", self._rank_lanes(site), site.links.device)
        return times

    def _source_s(self) -> dict[str, float]:
        situation = self._situation
        source, sent = situation.source, self._source_pulls * situation.layout_bytes
        return {
            "the source's network": sent / (situation.sources * source.cards * source.network),
            "the source's transfer engine": sent / (situation.sources * source.p2p),
        }

    def _incoming_s(self, site: Site, more: int) -> float:
        """All that its engines pull, and the layout so many times more."""
        times = self._pulls.get(site.host, 0) + more
        return times * self._situation.layout_bytes / (site.links.cards * site.links.network)

    def _reload(self, site: Site, *, of_gpus: bool = False) -> StageCost:
        """
        Args:
            of_gpus: what is read lies in memory of GPUs of its host.
        """
        written = self._written[site.host]
        if not site.gpus:
            seconds = self._copied[site.host] / site.links.memory
            return StageCost("reload", seconds, written, "its host's memory")
        if of_gpus:
            limit = "what a GPU reads of its peers"
            return StageCost("reload", site.rank_bytes / site.links.peer, written, limit)
        seconds = site.rank_bytes / (site.links.device * GATHER_SHARE)
        return StageCost("reload", seconds, written, "a GPU's link to its host")

    def _buckets(self, staging: StagingSize, lanes: int) -> int:
        return max(1, count_buckets(self._situation.layout_bytes, staging.bucket_bytes, lanes))


def _overlapped(
    route: RouteName,
    stages: tuple[StageCost, ...],
    buckets: int,
    slots: int,
    among: Mapping[str, float] | None = None,
) -> RouteCost:
    """Stages that overlap, bucket by bucket.

    Args:
        stages: the first fetches.
        among: what limits fetching if several hosts fetch different buckets at once; None: one
            host does, bucket after bucket.
    """
    held_s = sum(stage.seconds for stage in stages)
    limits = {f"{stage.limit} in {stage.name}": stage.seconds for stage in stages}
    if among is not None:
        del limits[f"{stages[0].limit} in fetch"]
        limits |= {f"{limit} in fetch": seconds for limit, seconds in among.items()}
    held = f"{slots} slot{'s' * (slots > 1)}, held from fetch to reload"
    limits[held] = held_s / slots
    limit = max(limits, key=limits.__getitem__)
    pace_s = limits[limit]
    return RouteCost(
        route=route,
        stages=stages,
        seconds=pace_s + (held_s - pace_s) / buckets,
        pace_s=pace_s,
        limit=limit,
        buckets=buckets,
    )


def _slowest(
    name: CostStage,
    size: int,
    limits: Mapping[str, float],
    buckets: int,
    bucket_s: float = BUCKET_S,
) -> StageCost:
    limit = max(limits, key=limits.__getitem__)
    return StageCost(name, limits[limit] + buckets * bucket_s, size, limit)


def _seconds(stage: StageCost) -> float:
    return stage.seconds
