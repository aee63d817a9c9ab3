"""Which engines share a broadcast, which pull for themselves, and which have no way. Pure.

`Choice` is `plan_round` while it decides: whoever is refused, or barred from a broadcast for want
of memory, may leave a peer alone, so that everyone is looked at again until nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.cost import RouteCost, Site, Situation, assume, predict
from weightbus.consumers.planning.groups import lanes_of, plan_groups, plan_lanes
from weightbus.consumers.planning.staging import StagingLimits, plan_staging, short_of_memory
from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import Group, Join, Links, Member
from weightbus.schemas.shared_memory import MAX_READERS

__all__ = ("Choice", "Outcome", "PlanLimits", "PlanSource")


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


class PlanSource(Struct, frozen=True, kw_only=True):
    """Where the version comes from, as far as the planner is told."""

    links: Links | None = None
    """Of each host that offers it; None: of the best that any engine's host has."""
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
    situation: Situation
    costs: dict[str, RouteCost]


class Choice:
    """The routes, while they are chosen. `outcome` and `other` are there once they are settled."""

    def __init__(
        self, joins: dict[str, Join], epoch: int, late: bool, limits: PlanLimits, source: PlanSource
    ) -> None:
        self.joins = joins
        """Of engines that are not refused, in order of the ids."""
        self.refused: dict[str, str] = {}
        self.choosers: tuple[str, ...] = ()
        """Engines that could take a broadcast together."""
        self.outcome: Outcome
        self.other: Outcome | None = None
        """What was not chosen."""
        self._epoch, self._late, self._limits, self._source = epoch, late, limits, source
        self._barred: dict[str, str] = {}
        """Engine id -> why it takes no broadcast."""
        for engine, join in joins.items():
            numbers = [offer.rank for offer in join.ranks]
            if len(set(numbers)) < len(numbers):
                reason = PlanError(f"join of engine {engine}", numbers, "ranks must be unique")
                self.refused[engine] = str(reason)
            elif late:
                self._barred[engine] = "it came late: no peer is disturbed"
        self._drop_refused()

    def settle(self) -> None:
        """Choose, until everyone who is left has a route and the memory for it."""
        while self.joins:
            self.choosers = self._sharers()
            unreachable = [engine for engine in self.joins if self._alone(engine) is None]
            for engine in unreachable:
                self.refused[engine] = self._why_unreachable(engine)
            if not (unreachable or self._make_room()):
                self._compare()
                return
            self._drop_refused()

    def reason(self, engine: str) -> str:
        """Why an engine takes its route, with the seconds that it is predicted to take."""
        cost = self.outcome.costs[engine]
        seconds = f"{cost.seconds:.3g} s"
        if cost.route == "local":
            return f"its host can read every segment: {seconds}"
        other = None if self.other is None else self.other.costs.get(engine)
        instead = f", by {other.route} {other.seconds:.3g} s" if other is not None else ""
        if cost.route == "broadcast":
            hosts, lanes = len(self.outcome.groups[0].members), len(self.outcome.groups)
            of = f"{hosts} host{'s' * (hosts > 1)}, {lanes} lane{'s' * (lanes > 1)}"
            return f"{len(self.choosers)} engines on {of}: {seconds}{instead}"
        if engine in self.choosers:
            return f"faster than a broadcast: {seconds}{instead}"
        return f"{self._why_alone(engine)}: {seconds}"

    # Steps.

    def _drop_refused(self) -> None:
        self.joins = {e: join for e, join in self.joins.items() if e not in self.refused}

    def _offers(self, engine: str, route: RouteName) -> bool:
        return all(route in offer.routes for offer in self.joins[engine].ranks)

    def _alone(self, engine: str) -> RouteName | None:
        """The route of an engine if it takes none together with others, or if it must."""
        for route in ("local", "p2p"):
            if self._offers(engine, route):
                return route
        return "broadcast" if engine in self.choosers else None

    def _sharers(self) -> tuple[str, ...]:
        """Engines that could take a broadcast together: two at least."""
        far = [
            engine
            for engine in self.joins
            if not self._offers(engine, "local")
            and self._offers(engine, "broadcast")
            and engine not in self._barred
        ]
        ranks: dict[str, int] = {}
        for engine in far:
            host = self.joins[engine].host_id
            ranks[host] = ranks.get(host, 0) + len(self.joins[engine].ranks)
        far = [engine for engine in far if ranks[self.joins[engine].host_id] <= MAX_READERS]
        if len({self.joins[engine].host_id for engine in far}) > 1:
            far = [engine for engine in far if self.joins[engine].rendezvous]
        return tuple(far) if len(far) > 1 else ()

    def _why_alone(self, engine: str) -> str:
        """Why an engine does not take part in a broadcast."""
        if engine in self._barred:
            return self._barred[engine]
        if not self._offers(engine, "broadcast"):
            return "it offers nothing nearer"
        if not self.joins[engine].rendezvous:
            return "no group can meet at it"
        return "no other engine could share a broadcast"

    def _why_unreachable(self, engine: str) -> str:
        offered = [route for route in ("local", "broadcast", "p2p") if self._offers(engine, route)]
        found = f"offering {', '.join(offered) or 'nothing'} on all its ranks"
        limit = "must offer local or p2p"
        if "broadcast" in offered:
            limit = f"{limit}, since {self._why_alone(engine)}"
        return str(PlanError(f"engine {engine}", found, limit))

    def _routes(self, *, together: bool) -> dict[str, RouteName]:
        routes: dict[str, RouteName] = {}
        for engine in self.joins:
            alone = self._alone(engine)
            assert alone is not None, "who has no route is refused before"
            routes[engine] = "broadcast" if together and engine in self.choosers else alone
        return routes

    def _lanes(self, routes: Mapping[str, RouteName]) -> dict[Member, int]:
        """Rank -> how many lanes it stages."""
        lanes = lanes_of(plan_lanes(self._members(routes)))
        for engine, route in routes.items():
            if route == "p2p":
                lanes |= {Member(engine, offer.rank): 1 for offer in self.joins[engine].ranks}
        return lanes

    def _members(self, routes: Mapping[str, RouteName]) -> list[Join]:
        return [join for engine, join in self.joins.items() if routes[engine] == "broadcast"]

    def _make_room(self) -> bool:
        """Whether someone was barred or refused for want of memory: one step of it.

        Who has room for a broadcast has room for pulling: a host has as many lanes of it as ranks.
        """
        routes = self._routes(together=bool(self.choosers))
        lanes, limits = self._lanes(routes), self._limits.staging
        tight = short_of_memory(self.joins.values(), lanes, limits)
        for engines, reason in tight:
            shared = [engine for engine in engines if routes[engine] == "broadcast"]
            for engine in shared:
                self._barred[engine] = f"too little memory for its lanes: {reason}"
            if not shared:
                last = engines[-1]
                error = PlanError(f"engine {last}", "short of memory for staging", reason)
                self.refused[last] = str(error)
        return bool(tight)

    def _compare(self) -> None:
        """The two ways of those who could share, if both are open to them."""
        apart_routes = self._routes(together=False)
        if not self.choosers:
            self.outcome = self._evaluate(apart_routes)
            return
        together = self._evaluate(self._routes(together=True))
        if any(apart_routes[engine] == "broadcast" for engine in self.choosers):
            self.outcome = together
            return
        apart = self._evaluate(apart_routes)
        if self._is_no_slower(together, apart):
            self.outcome, self.other = together, apart
        else:
            self.outcome, self.other = apart, together

    def _is_no_slower(self, together: Outcome, apart: Outcome) -> bool:
        limits = self._limits
        shared = max(
            cost.seconds - cost.form_s * (1 - 1 / limits.form_versions)
            for cost in (together.costs[engine] for engine in self.choosers)
        )
        alone = max(apart.costs[engine].seconds for engine in self.choosers)
        return shared <= max(alone * (1 + limits.tie_share), alone + limits.tie_s)

    def _evaluate(self, routes: dict[str, RouteName]) -> Outcome:
        joins = list(self.joins.values())
        groups = plan_groups(plan_lanes(self._members(routes)), self.joins, self._epoch)
        staging = plan_staging(joins, self._lanes(routes), self._limits.staging)
        least = min(sum(offer.need_bytes for offer in join.ranks) for join in joins)
        situation = Situation(
            layout_bytes=self._source.layout_bytes or least,
            source=self._source.links or _best([join.links for join in joins]),
            sources=self._source.hosts,
            bucket_bytes=staging.bucket_bytes,
            slots=staging.slots,
            ready=all(not group.id.endswith(f"-{self._epoch}") for group in groups),
            files=self._source.files,
        )
        costs = predict([_site(join) for join in joins], routes, situation)
        return Outcome(routes, groups, situation, costs)


def _site(join: Join) -> Site:
    return Site(
        engine=join.engine,
        host=join.host_id,
        ranks=len(join.ranks),
        need_bytes=sum(offer.need_bytes for offer in join.ranks),
        links=assume(join.links),
        tree=any(offer.device == "cpu" for offer in join.ranks),
    )


def _best(links: Sequence[Links]) -> Links:
    """Of a source that is not known: the best of every figure of the hosts that are."""
    return assume(
        Links(
            network=max(link.network for link in links),
            p2p=max(link.p2p for link in links),
            cards=max(link.cards for link in links),
        )
    )
