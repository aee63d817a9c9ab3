"""What `plan_round` would decide for a fleet that a file describes, and why. Pure.

The planner is the one that a round's leader calls, given joins that the fleet's engines would send.
An engine whose ranks are of several hosts is one part for each: every host takes in the whole
layout, whichever ranks it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta, Struct

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.cost import RouteCost
from weightbus.consumers.planning.routes import RoundDecision, PlanSource, plan_round
from weightbus.consumers.planning.shapes import Family, rank_bytes, whole_bytes
from weightbus.schemas.base import RouteName, Token
from weightbus.schemas.placement import HostId
from weightbus.schemas.rounds import Join, Links, RankOffer, RoundPlan

__all__ = ("Explanation", "Fleet", "FleetEngine", "FleetSource", "PartExplained", "explain")

MAX_RANKS = 65_536
"""Of a fleet."""

_ROUTES: tuple[RouteName, ...] = ("local", "broadcast", "p2p")
Count = Annotated[int, Meta(ge=1, le=MAX_RANKS)]


class FleetSource(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the version comes from."""

    hosts: Count = 1
    """That offer it, an equal part each."""
    links: Links | None = None
    """Of each of them; not given: the best of any engine's host."""
    files: bool = False
    """Engines that go `local` read files, not memory."""


class FleetEngine(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Engines that are alike."""

    id: Token
    """Of several, followed by a number."""
    count: Count = 1
    tp: Count = 1
    """Ranks of one engine."""
    ranks_per_host: Count | None = None
    """Not given: all on one host."""
    expert_parallel: bool = False
    """Experts are shared out whole, instead of cut."""
    hosts: tuple[HostId, ...] = ()
    """For every part of every engine, its host; not given: each has one of its own."""
    device: str = "cuda"
    """`cpu`: its groups are gloo's."""
    free_bytes: Annotated[int, Meta(ge=0)] = 0
    """For staging, of every rank; 0: as much as may be."""
    routes: tuple[RouteName, ...] = ("broadcast", "p2p")
    """That it offers; one whose plan is not proven yet offers no `broadcast`."""
    links: Links = Links()
    """Of each of its hosts."""


class Fleet(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Engines, and what lies between them."""

    engines: Annotated[tuple[FleetEngine, ...], Meta(min_length=1, max_length=4096)]
    source: FleetSource = FleetSource()


class PartExplained(Struct, frozen=True, kw_only=True):
    """One engine's ranks on one host."""

    engine: Token
    part: Token
    """The engine's id again, if it is all on one host."""
    host: str
    ranks: int
    route: RouteName | None
    """None: it cannot be planned for."""
    reason: str
    cost: RouteCost | None
    rank_bytes: int
    """Written into the parameters of its largest rank: of its card."""
    rejected: dict[RouteName, str]
    """Every other route -> why not."""


class Explanation(Struct, frozen=True, kw_only=True):
    """A plan, and why it is so."""

    layout_bytes: int
    tensors: int
    ranks: int
    hosts: int
    lanes: int
    bucket_bytes: int
    slots: int
    seconds: float
    """Until the last engine has it."""
    parts: tuple[PartExplained, ...]
    plan: RoundPlan | None = None


def explain(families: Sequence[Family], fleet: Fleet) -> Explanation:
    """Plan a round of `fleet` for a model.

    Raises:
        PlanError: the fleet contradicts itself.
    """
    parts = {
        join.engine: (engine, join)
        for described in fleet.engines
        for engine, join in _joins(described, families)
    }
    joins = [join for _, join in parts.values()]
    ranks = sum(len(join.ranks) for join in joins)
    if ranks > MAX_RANKS:
        raise PlanError("fleet", f"{ranks} ranks", f"must be at most {MAX_RANKS}")
    source = fleet.source
    size = whole_bytes(families)
    decision = plan_round(
        joins,
        version=0,
        round_id="explained",
        epoch=1,
        leader=joins[0].engine,
        now_ns=0,
        source=PlanSource(
            links=source.links, hosts=source.hosts, layout_bytes=size, files=source.files
        ),
    )
    plan = decision.plan
    return Explanation(
        layout_bytes=size,
        tensors=sum(family.count for family in families),
        ranks=ranks,
        hosts=len({join.host_id for join in joins}),
        lanes=0 if plan is None else len(plan.groups),
        bucket_bytes=0 if plan is None else plan.bucket_bytes,
        slots=0 if plan is None else plan.slots,
        seconds=max((cost.seconds for cost in decision.costs.values()), default=0.0),
        parts=tuple(
            _part(engine, join, decision, _reasons(plan)) for engine, join in parts.values()
        ),
        plan=plan,
    )


def _joins(described: FleetEngine, families: Sequence[Family]) -> list[tuple[str, Join]]:
    """(Engine id, join of a part) of engines that are alike."""
    per_host = min(described.ranks_per_host or described.tp, described.tp)
    parts = -(-described.tp // per_host)
    hosts = described.hosts
    if hosts and len(hosts) != parts * described.count:
        limit = f"must be one for each of {described.count} engines x {parts} parts"
        raise PlanError(f"hosts of engine {described.id}", f"{len(hosts)} long", limit)
    need = rank_bytes(families, described.tp, expert_parallel=described.expert_parallel)
    joins = []
    for number in range(described.count):
        engine = described.id if described.count == 1 else f"{described.id}-{number}"
        for part in range(parts):
            name = engine if parts == 1 else f"{engine}-part{part}"
            own = f"{name}-host"
            join = Join(
                model="model",
                version=0,
                round="explained",
                engine=name,
                consumer=name,
                host_id=hosts[number * parts + part] if hosts else own,
                ranks=tuple(
                    RankOffer(
                        rank=rank,
                        device=described.device,
                        needs_digest="0" * 64,
                        need_bytes=need,
                        free_bytes=described.free_bytes,
                        routes=described.routes,
                    )
                    for rank in range(part * per_host, min((part + 1) * per_host, described.tp))
                ),
                links=described.links,
                rendezvous=f"tcp://{own}:1",
            )
            joins.append((engine, join))
    return joins


def _reasons(plan: RoundPlan | None) -> dict[str, str]:
    return {} if plan is None else {part.engine: part.ranks[0].reason for part in plan.engines}


def _part(
    engine: str, join: Join, decision: RoundDecision, reasons: dict[str, str]
) -> PartExplained:
    cost = decision.costs.get(join.engine)
    route = None if cost is None else cost.route
    other = decision.others.get(join.engine)
    rejected: dict[RouteName, str] = {}
    for name in _ROUTES:
        if name == route:
            continue
        if name not in join.ranks[0].routes:
            rejected[name] = "it is not offered"
        elif other is not None and name == other.route:
            slowest = other.slowest
            rejected[name] = (
                f"{other.seconds:.3g} s: {slowest.limit} takes {slowest.seconds:.3g} s "
                f"in {slowest.name}"
            )
        elif route == "local":
            rejected[name] = "nothing is nearer than local"
        else:
            rejected[name] = reasons.get(join.engine) or decision.refused[join.engine]
    return PartExplained(
        engine=engine,
        part=join.engine,
        host=join.host_id,
        ranks=len(join.ranks),
        route=route,
        reason=reasons.get(join.engine) or decision.refused[join.engine],
        cost=cost,
        rank_bytes=join.ranks[0].need_bytes,
        rejected=rejected,
    )
