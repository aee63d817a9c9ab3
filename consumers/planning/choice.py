"""Which engines share a broadcast, which pull for themselves, and which have no way. Pure.

`settle` first finds who can be planned for at all: whoever is refused, or barred from a broadcast
for want of memory, may leave a peer alone, so that everyone is looked at again until nothing
changes. Then it compares: the broadcast of all who could share one, that of their fastest hosts
alone, for a few numbers of hosts, and each for itself.

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
from weightbus.consumers.planning.sharing import Sharing, find_sharers, offers
from weightbus.consumers.planning.staging import (
    StagingLimits,
    StagingSize,
    fit_staging,
    full_staging,
    memory_of,
    rooms,
    short_of_memory,
)
from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import Group, Join, Links

__all__ = ("Choice", "Outcome", "PlanLimits", "PlanSource", "Settled", "seconds_text")

MAX_CUTS: Final = 12
"""Broadcasts of the fastest hosts alone that are looked at: at the widest gaps between hosts."""


class PlanLimits(Struct, frozen=True, kw_only=True):
    """What a plan may ask of the machines that run it."""

    staging: StagingLimits = StagingLimits()
    slowest_bytes_per_s: int = 200 * 2**20
    """A host that moves its bytes slower than this has failed; it sets a large model's deadline."""
    predicted_times: float = 4.0
    """A transfer may take so many times what is predicted for it."""
    form_versions: int = 10
    """Forming groups is paid once for so many versions, when routes are compared."""
    tie_share: float = 0.1
    """Predicted times that differ by less than this share, or by less than `tie_s`, are equal."""
    tie_s: float = 0.25

    def about(self, seconds: float, times: int = 1) -> float:
        """The longest that is about as long as the sum of so many times."""
        return max(seconds * (1 + self.tie_share), seconds + times * self.tie_s)


class PlanSource(Struct, frozen=True, kw_only=True):
    """Where the version comes from, as far as the planner is told."""

    links: Links | None = None
    """Of each host that offers it; None: of the best host of any engine."""
    hosts: int = 1
    layout_bytes: int = 0
    """Of the whole version; 0, not known: the least that all ranks of one engine need. That is too
    much if they hold tensors twice, and too little if the engine takes only a part of them."""
    files: bool = False
    """`local` reads files, not memory."""


class Outcome(Struct, frozen=True):
    """Routes of all engines, and what follows from them."""

    routes: dict[str, RouteName]
    groups: tuple[Group, ...]
    staging: StagingSize
    """Of every lane of a broadcast; who pulls has this at most."""
    layout_bytes: int
    costs: dict[str, RouteCost]


class Settled(Struct, frozen=True, kw_only=True):
    """What was chosen for those who are not refused."""

    outcome: Outcome
    others: dict[str, RouteCost]
    """Engine id -> what it would have taken together with all others, or, if it now does, alone."""
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
            self.sharing = find_sharers(self.joins, self._late | self._tight)
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
        """Engine id -> how many lanes it stages."""
        lanes = lanes_of(plan_lanes(self._members(routes)))
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
        together = [self._evaluate(self._routes(fast)) for fast in self._fast_hosts()]
        must = any(self._alone(engine) == "broadcast" for engine in self.sharing.engines)
        if must:  # some engine ends in a broadcast, or never
            return self._settled(self._best(together), together[0], None)
        apart = self._evaluate(self._routes(()))
        last_s = max(self._lasting(apart).values())
        fair = [
            outcome
            for outcome in together
            if max(self._lasting(outcome).values()) < last_s or self._is_fair(outcome, apart)
        ]
        whole = together[0] if together else None
        return self._settled(self._best([*fair, apart]), whole, apart)

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
        situation = self._situation(ready=True)
        hosts: dict[str, list[Site]] = {}
        for engine in self.sharing.engines:
            size = fit_staging(free[engine], full, self._limits.staging.min_bucket_bytes)
            site = _site(self.joins[engine], size)
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
        situation = self._situation(ready=planned.ready)
        staging, sizes = self._sizes(routes)
        sites = [_site(join, sizes[engine]) for engine, join in self.joins.items()]
        costs = predict(sites, routes, situation)
        return Outcome(routes, planned.groups, staging, situation.layout_bytes, costs)

    def _sizes(self, routes: Mapping[str, RouteName]) -> tuple[StagingSize, dict[str, StagingSize]]:
        """The plan's slots, and those that every engine can have of it.

        All lanes of a broadcast have the slots that the tightest of them has room for. Who pulls
        takes of the plan's what it has room for, so that nobody else is held up by it.
        """
        limits, free = self._limits.staging, self._rooms(routes)
        full = self._full(routes)
        shared = [room for e, room in free.items() if routes[e] == "broadcast" and room is not None]
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

    def _situation(self, *, ready: bool) -> Situation:
        source, joins = self._source, list(self.joins.values())
        return Situation(
            layout_bytes=self._layout_bytes(),
            source=assume(source.links or _best_links([join.links for join in joins])),
            sources=source.hosts,
            ready=ready,
            files=source.files,
        )

    # Words.

    def _settled(self, outcome: Outcome, whole: Outcome | None, apart: Outcome | None) -> Settled:
        others: dict[str, RouteCost] = {}
        for engine in self.sharing.engines:
            other = apart if outcome.routes[engine] == "broadcast" else whole
            if other is not None:
                others[engine] = other.costs[engine]
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


def _site(join: Join, staging: StagingSize) -> Site:
    return Site(
        engine=join.engine,
        host=join.host_id,
        ranks=len(join.ranks),
        need_bytes=sum(offer.need_bytes for offer in join.ranks),
        links=assume(join.links),
        staging=staging,
        tree=any(offer.device == "cpu" for offer in join.ranks),
    )


def _best_links(links: Sequence[Links]) -> Links:
    """Of a source that is not known: those of the host with the widest network, whole."""
    known = [assume(link) for link in links]
    return max(known, key=lambda link: (link.cards * link.network, link.p2p))
