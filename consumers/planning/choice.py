"""Which engines share a broadcast, which pull for themselves, and which have no way. Pure.

`settle` first finds who can be planned for at all: whoever is refused, or barred from a broadcast
for want of memory, may leave a peer alone, so that everyone is looked at again until nothing
changes. Then it compares: the broadcast of all who could share one, that of their fastest hosts
alone, for a few numbers of hosts, and each for itself.

Then replicas are looked at: engines of one host that could read its memory in place. They share a
broadcast only if that is much sooner for each of them, and no other engine loses by it.

- Whoever would take much longer in a broadcast than alone is not kept in it, unless the last
  engine of all ends sooner for it.
- Of what is left, what ends soonest counts, then the sum of all engines' times, and if these are
  about equal, the most hosts in the broadcast: the source sends the less.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from msgspec import Struct, structs

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.cost import RouteCost, Site, Situation, assume, predict
from weightbus.consumers.planning.groups import lanes_of, plan_groups, plan_lanes
from weightbus.consumers.planning.limits import PlanLimits
from weightbus.consumers.planning.replicas import find_replicas, replica_sets
from weightbus.consumers.planning.sharing import Sharing, find_sharers, is_on_gpus, offers
from weightbus.consumers.planning.source import PlanSource
from weightbus.consumers.planning.staging import (
    DEVICE_SLOTS,
    StagingSize,
    device_room,
    fit_staging,
    full_staging,
    memory_of,
    rooms,
    short_of_memory,
)
from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import Group, Join, Links

__all__ = ("Choice", "Outcome", "Settled", "seconds_text")

MAX_CUTS: Final = 12
"""Broadcasts of the fastest hosts alone that are looked at: at the widest gaps between hosts."""


class Outcome(Struct, frozen=True):
    """Routes of all engines, and what follows from them."""

    routes: dict[str, RouteName]
    groups: tuple[Group, ...]
    staging: StagingSize
    """Of every lane of a broadcast; who pulls has this at most."""
    layout_bytes: int
    costs: dict[str, RouteCost]
    device: bool = False
    """The lanes lie in memory of GPUs."""


class Settled(Struct, frozen=True, kw_only=True):
    """What was chosen for those who are not refused."""

    outcome: Outcome
    others: dict[str, RouteCost]
    """Engine id -> what it would have taken together with all others, or, if it now does, alone. Of
    replicas: together with those of their host."""
    reasons: dict[str, str]
    """Engine id -> why it takes its route, with the seconds that it is predicted to take."""


class Choice:
    """The routes, while they are chosen.

    Args:
        joins: engine id -> its join, in order of the ids.
    """

    def __init__(
        self,
        joins: dict[str, Join],
        epoch: int,
        late: bool,
        limits: PlanLimits,
        source: PlanSource,
    ) -> None:
        self.joins = joins
        """Of engines that are not refused."""
        self.refused: dict[str, str] = {}
        self.sharing = Sharing((), {})
        self.replicas: dict[str, tuple[str, ...]] = {}
        """Host -> its engines that could share what they read in place."""
        self._epoch, self._limits, self._source = epoch, limits, source
        self._memory = memory_of(joins.values())
        self._late: dict[str, str] = {}
        self._tight: dict[str, str] = {}
        """Engine id -> why it takes no broadcast: it came late, or has no memory for it."""
        for engine, join in joins.items():
            numbers = [offer.rank for offer in join.ranks]
            if len(set(numbers)) < len(numbers):
                reason = PlanError(f"join of engine {engine}", numbers, "ranks must be unique")
                self.refused[engine] = str(reason)
            elif late:
                self._late[engine] = "it came late: no peer is disturbed"
        self._drop_refused()

    def settle(self) -> Settled | None:
        """Choose, once everyone who is left has a route and the memory for it; None: nobody is."""
        while self.joins:
            barred = self._late | self._tight
            self.sharing = find_sharers(self.joins, barred)
            if self._source.memory == "host":
                self.replicas = find_replicas(self.joins, barred)
            unreachable = [engine for engine in self.joins if self._alone(engine) is None]
            for engine in unreachable:
                self.refused[engine] = self._why_unreachable(engine)
            if not (unreachable or self._make_room()):
                return self._compare()
            self._drop_refused()
        return None

    # Steps.

    def _drop_refused(self) -> None:
        self.joins = {e: join for e, join in self.joins.items() if e not in self.refused}

    def _alone(self, engine: str) -> RouteName | None:
        """The route of an engine if it takes none together with others, or if it must."""
        for route in ("local", "p2p"):
            if offers(self.joins[engine], route):
                return route
        return None if engine in self.sharing.apart else "broadcast"

    def _why_unreachable(self, engine: str) -> str:
        join = self.joins[engine]
        offered = [route for route in ("local", "broadcast", "p2p") if offers(join, route)]
        found = f"offering {', '.join(offered) or 'nothing'} on all its ranks"
        limit = "must offer local or p2p"
        if "broadcast" in offered:
            limit = f"{limit}, since {self.sharing.apart[engine]}"
        return str(PlanError(f"engine {engine}", found, limit))

    def _routes(self, together: Collection[str]) -> dict[str, RouteName]:
        routes: dict[str, RouteName] = {}
        chosen = frozenset(together)
        for engine in self.joins:
            alone = self._alone(engine)
            assert alone is not None, "who has no route is refused before"
            routes[engine] = "broadcast" if engine in chosen else alone
        return routes

    def _lanes(self, routes: Mapping[str, RouteName]) -> dict[str, int]:
        """Engine id -> how many lanes it stages in memory of its host, of those who do."""
        lanes = lanes_of(plan_lanes(self._members(routes)))
        if self._device_room(routes):
            lanes = {engine: count for engine, count in lanes.items() if not self._is_near(engine)}
        for engine, route in routes.items():
            if route == "p2p":
                lanes[engine] = len(self.joins[engine].ranks)
        return lanes

    def _members(self, routes: Mapping[str, RouteName]) -> list[Join]:
        return [join for engine, join in self.joins.items() if routes[engine] == "broadcast"]

    def _make_room(self) -> bool:
        """Whether someone was barred or refused for want of memory: one step of it.

        Who has room for a broadcast has room for pulling: a host has as many lanes of it as ranks.
        A host takes part in a broadcast with all its engines, or with none.
        """
        routes = self._routes(self.sharing.engines)
        lanes = self._lanes(routes)
        short = short_of_memory(self._memory, self.joins, lanes, self._limits.staging)
        barred: dict[str, str] = {}
        for engine, reason in short.items():
            if routes[engine] == "broadcast":
                barred.setdefault(self.joins[engine].host_id, reason)
            else:
                error = PlanError(f"engine {engine}", "short of memory for staging", reason)
                self.refused[engine] = str(error)
                self._tight.clear()  # there are fewer lanes now
        for engine in self.sharing.engines:
            reason = barred.get(self.joins[engine].host_id, "")
            if reason:
                self._tight[engine] = f"too little memory for its host's lanes: {reason}"
        return bool(short)

    # Comparing.

    def _compare(self) -> Settled:
        best, whole, apart = self._among_far()
        sets = replica_sets(self.joins, self.replicas, self._late | self._tight)
        possible = filter(self._is_possible, sets)
        tried = [self._evaluate(self._routes(engines)) for engines in possible]
        tried = [outcome for outcome in tried if outcome.device]
        worth = [outcome for outcome in tried if self._is_worth(outcome, best)]
        if worth:
            chosen = min(worth, key=self._ending)
            return self._settled(chosen, whole, apart, near=best)
        return self._settled(best, whole, apart, near=min(tried, key=self._ending, default=None))

    def _among_far(self) -> tuple[Outcome, Outcome | None, Outcome | None]:
        """The best for those who cannot read in place, the broadcast of all of them, and none."""
        together = [self._evaluate(self._routes(fast)) for fast in self._fast_hosts()]
        must = any(self._alone(engine) == "broadcast" for engine in self.sharing.engines)
        if must:  # some engine ends in a broadcast, or never
            return self._best(together), together[0], None
        apart = self._evaluate(self._routes(()))
        last_s = max(self._lasting(apart).values())
        fair = [
            outcome
            for outcome in together
            if max(self._lasting(outcome).values()) < last_s or self._is_fair(outcome, apart)
        ]
        whole = together[0] if together else None
        return self._best([*fair, apart]), whole, apart

    def _near(self) -> set[str]:
        """All replicas."""
        return {engine for replicas in self.replicas.values() for engine in replicas}

    def _is_possible(self, engines: tuple[str, ...]) -> bool:
        """Whether nobody else must be with them, and all have the memory."""
        routes = self._routes(engines)
        members = {join.engine for join in self._members(routes)}
        short = short_of_memory(self._memory, self.joins, self._lanes(routes), self._limits.staging)
        return members == set(engines) and not short

    def _is_worth(self, outcome: Outcome, without: Outcome) -> bool:
        """Whether those who need not share gain much by it, and nobody else loses."""
        before, after = self._lasting(without), self._lasting(outcome)
        for engine, seconds in before.items():
            gives_up = offers(self.joins[engine], "local") and outcome.routes[engine] != "local"
            most = self._limits.worth(seconds) if gives_up else self._limits.about(seconds)
            if after[engine] > most:
                return False
        return sum(after.values()) < sum(before.values())

    def _ending(self, outcome: Outcome) -> tuple[float, float]:
        """When the last engine ends, and the sum of all."""
        lasting = self._lasting(outcome).values()
        return max(lasting), sum(lasting)

    def _fast_hosts(self) -> list[list[str]]:
        """Who could broadcast together: all; and without the slowest hosts, down to the fastest.

        Those who can do nothing else are in all of them.
        """
        sharers = self.sharing.engines
        paces = self._own_paces()
        order = sorted(paces, key=lambda host: (paces[host], host))
        gaps = [
            (paces[order[count]] / max(paces[order[count - 1]], 1e-9), count)
            for count in range(1, len(order))
        ]
        widest = sorted((gap for gap in gaps if gap[0] > 1), reverse=True)[:MAX_CUTS]
        found: list[list[str]] = []
        counts = {len(order), *(count for _, count in widest)}
        if any(self._alone(engine) == "broadcast" for engine in sharers):
            counts |= {0, 1}  # no more than they need to share it with
        for count in sorted(counts, reverse=True):
            fast = set(order[:count])
            engines = [
                engine
                for engine in sharers
                if self.joins[engine].host_id in fast or self._alone(engine) == "broadcast"
            ]
            if len(engines) > 1:
                found.append(engines)
        return found

    def _own_paces(self) -> dict[str, float]:
        """Host -> seconds that a broadcast takes at least if it is in it: with one more like it."""
        routes = self._routes(self.sharing.engines)
        free, full = self._rooms(routes), self._full(routes)
        situation = self._situation(ready=True, device=bool(self._device_room(routes)))
        hosts: dict[str, list[Site]] = {}
        for engine in self.sharing.engines:
            size = fit_staging(free[engine], full, self._limits.staging.min_bucket_bytes)
            site = self._site(engine, size)
            hosts.setdefault(site.host, []).append(site)
        paces = {}
        for host, sites in hosts.items():
            twins = [
                structs.replace(site, engine=f"{site.engine} again", host=f"{host} again")
                for site in sites
            ]
            all_routes: dict[str, RouteName] = {
                site.engine: "broadcast" for site in (*sites, *twins)
            }
            costs = predict([*sites, *twins], all_routes, situation)
            paces[host] = max(cost.seconds for cost in costs.values())
        return paces

    def _best(self, outcomes: Sequence[Outcome]) -> Outcome:
        """The first, of most hosts, that is about as good as the best."""
        limits = self._limits
        lasts = [max(self._lasting(outcome).values()) for outcome in outcomes]
        soon = limits.about(min(lasts))
        ends = [outcome for outcome, last in zip(outcomes, lasts, strict=True) if last <= soon]
        sums = [sum(self._lasting(outcome).values()) for outcome in ends]
        least = limits.about(min(sums), len(self.joins))
        return next(outcome for outcome, total in zip(ends, sums, strict=True) if total <= least)

    def _is_fair(self, outcome: Outcome, apart: Outcome) -> bool:
        """Nobody takes much longer than alone."""
        alone = self._lasting(apart)
        lasting = self._lasting(outcome)
        return all(lasting[engine] <= self._limits.about(alone[engine]) for engine in lasting)

    def _lasting(self, outcome: Outcome) -> dict[str, float]:
        """Engine id -> seconds of one version of many."""
        saved = 1 - 1 / self._limits.form_versions
        return {
            engine: cost.seconds - cost.form_s * saved for engine, cost in outcome.costs.items()
        }

    def _evaluate(self, routes: dict[str, RouteName]) -> Outcome:
        planned = plan_groups(plan_lanes(self._members(routes)), self.joins, self._epoch)
        room = self._device_room(routes)
        situation = self._situation(ready=planned.ready, device=bool(room))
        staging, sizes = self._sizes(routes, room)
        sites = [self._site(engine, sizes[engine]) for engine in self.joins]
        costs = predict(sites, routes, situation)
        size = situation.layout_bytes
        return Outcome(routes, planned.groups, staging, size, costs, device=bool(room))

    def _device_room(self, routes: Mapping[str, RouteName]) -> int:
        """Bytes for each lane of the broadcast in memory of GPUs; 0: its lanes are not there, since
        it is not among GPUs, or they have no room."""
        members = self._members(routes)
        if not (members and all(map(is_on_gpus, members))):
            return 0
        room = device_room(members, plan_lanes(members))
        return room if room >= DEVICE_SLOTS * self._limits.staging.min_bucket_bytes else 0

    def _sizes(
        self, routes: Mapping[str, RouteName], device_bytes: int
    ) -> tuple[StagingSize, dict[str, StagingSize]]:
        """The plan's slots, and those that every engine can have of it.

        All lanes of a broadcast have the slots that the tightest of them has room for. Who pulls
        takes of the plan's what it has room for, so that nobody else is held up by it.
        """
        limits, free = self._limits.staging, self._rooms(routes)
        full = self._full(routes)
        shared = [room for e, room in free.items() if routes[e] == "broadcast" and room is not None]
        if device_bytes:
            shared.append(device_bytes)
        if "broadcast" in routes.values():
            full = fit_staging(min(shared, default=None), full, limits.min_bucket_bytes)
        sizes = {
            engine: full
            if route == "broadcast"
            else fit_staging(free.get(engine), full, limits.min_bucket_bytes)
            for engine, route in routes.items()
        }
        plan = StagingSize(
            bucket_bytes=max(size.bucket_bytes for size in sizes.values()),
            slots=max(size.slots for size in sizes.values()),
        )
        return plan, sizes

    def _full(self, routes: Mapping[str, RouteName]) -> StagingSize:
        """The slots of whoever has most lanes, if memory does not matter."""
        staged = [
            len(self.joins[engine].ranks)
            for engine, route in routes.items()
            if route == "p2p" or (route == "local" and self._source.files)
        ]
        lanes = len(plan_lanes(self._members(routes)))
        return full_staging(self._layout_bytes(), max([1, lanes, *staged]), self._limits.staging)

    def _rooms(self, routes: Mapping[str, RouteName]) -> dict[str, int | None]:
        return rooms(self._memory, self.joins, self._lanes(routes))

    def _layout_bytes(self) -> int:
        needs = (sum(offer.need_bytes for offer in join.ranks) for join in self.joins.values())
        return self._source.layout_bytes or min(needs)

    def _site(self, engine: str, staging: StagingSize) -> Site:
        join = self.joins[engine]
        needs = [offer.need_bytes for offer in join.ranks]
        return Site(
            engine=engine,
            host=join.host_id,
            ranks=len(needs),
            need_bytes=sum(needs),
            rank_bytes=max(needs),
            gpus=is_on_gpus(join),
            near=self._is_near(engine),
            links=assume(join.links),
            staging=staging,
            tree=any(offer.device == "cpu" for offer in join.ranks),
        )

    def _is_near(self, engine: str) -> bool:
        """Whether its workers can read the version in memory of their host."""
        return self._source.memory == "host" and offers(self.joins[engine], "local")

    def _situation(self, *, ready: bool, device: bool) -> Situation:
        source, joins = self._source, list(self.joins.values())
        return Situation(
            layout_bytes=self._layout_bytes(),
            source=assume(source.links or _best_links([join.links for join in joins])),
            sources=source.hosts,
            ready=ready,
            files=source.files,
            memory=source.memory,
            device=device,
        )

    # Words.

    def _settled(
        self,
        outcome: Outcome,
        whole: Outcome | None,
        apart: Outcome | None,
        *,
        near: Outcome | None,
    ) -> Settled:
        """
        Args:
            near: what replicas have left, or might have taken.
        """
        others: dict[str, RouteCost] = {}
        for engine in self.sharing.engines:
            other = apart if outcome.routes[engine] == "broadcast" else whole
            if other is not None:
                others[engine] = other.costs[engine]
        if near is not None:
            for engine, route in outcome.routes.items():
                concerned = route == "broadcast" or engine in self._near()
                if concerned and route != near.routes[engine]:
                    others[engine] = near.costs[engine]
        members = [join for e, join in self.joins.items() if outcome.routes[e] == "broadcast"]
        ranks = sum(len(join.ranks) for join in members)
        of = (
            f"{_count(ranks, 'rank')} of {_count(len({join.host_id for join in members}), 'host')} "
            f"share it in {_count(len(outcome.groups), 'lane')}"
        )
        reasons = {}
        for engine, cost in outcome.costs.items():
            why = of if cost.route == "broadcast" else self._why(cost, engine, others.get(engine))
            reasons[engine] = f"{why}: {seconds_text(cost.seconds)}"
            if engine in others:
                by = others[engine]
                reasons[engine] += f", by {by.route} {seconds_text(by.seconds)}"
        return Settled(outcome=outcome, others=others, reasons=reasons)

    def _why(self, cost: RouteCost, engine: str, together: RouteCost | None) -> str:
        if cost.route == "local":
            return "its host can read every segment"
        if engine in self.sharing.apart:
            return self.sharing.apart[engine]
        if together is not None and together.seconds < cost.seconds:
            return "the others are faster without it"
        return "faster than a broadcast of all"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def seconds_text(seconds: float) -> str:
    """Such as `10,292 s` and `0.0123 s`."""
    return f"{seconds:,.0f} s" if seconds >= 1000 else f"{seconds:.3g} s"


def _best_links(links: Sequence[Links]) -> Links:
    """Of a source that is not known: those of the host with the widest network, whole."""
    known = [assume(link) for link in links]
    return max(known, key=lambda link: (link.cards * link.network, link.p2p))
