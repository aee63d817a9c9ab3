"""What `plan_round` would decide for a fleet that a file describes, and why. Pure.

The planner is the one that a round's leader calls, given joins that the fleet's engines would send.
An engine whose ranks are of several hosts is one part for each: every host takes in the whole
layout, whichever ranks it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.choice import seconds_text
from weightbus.consumers.planning.cost import RouteCost
from weightbus.consumers.planning.host_links import HostLinks
from weightbus.consumers.planning.routes import RoundDecision, plan_round
from weightbus.consumers.planning.shapes import Family, rank_bytes, whole_bytes
from weightbus.consumers.planning.source import PlanSource, SourceMemory
from weightbus.schemas.base import RouteName, SizeBytes, Token
from weightbus.schemas.codec import encode
from weightbus.schemas.placement import HostId
from weightbus.schemas.rounds import Join, RankOffer, RoundPlan

__all__ = ("Explanation", "Fleet", "FleetEngine", "FleetSource", "PartExplained", "explain")

MAX_RANKS = 65_536
"""Of a fleet."""

MAX_PARTS = 4_096
"""Engines of one plan (`RoundPlan.engines`)."""

MAX_ID_CHARS = 64
"""Of a `Token`."""

MAX_BYTES = 2**50
"""Of a model (`SizeBytes`)."""

_ROUTES: tuple[RouteName, ...] = ("local", "broadcast", "p2p")
Count = Annotated[int, Meta(ge=1, le=MAX_RANKS)]


class FleetSource(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the version comes from."""

    hosts: Count = 1
    """That offer it, an equal part each."""
    links: HostLinks | None = None
    """Of each of them; not given: those of the best of the engines' hosts."""
    files: bool = False
    """Engines that go `local` read files, not memory."""
    memory: SourceMemory = "other"
    """That engines that go `local` read."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: it contradicts itself.
        """
        if self.files and self.memory != "other":
            raise ValueError(f"memory of the source is {self.memory}: must be other, of files")


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
    device: Literal["cpu", "cuda"] = "cuda"
    """`cpu`: its groups are gloo's."""
    free_bytes: SizeBytes = 0
    """For staging of one engine's ranks on one host, together; 0: as much as may be."""
    device_bytes: SizeBytes = 0
    """Free on each of its GPUs; 0: enough."""
    routes: Annotated[tuple[RouteName, ...], Meta(min_length=1, max_length=3)] = (
        "broadcast",
        "p2p",
    )
    """That it offers; one whose plan is not proven yet offers no `broadcast`."""
    links: HostLinks = HostLinks()
    """Of each of its hosts."""

    @property
    def per_host(self) -> int:
        """Ranks of one of its engines on one host."""
        return self.ranks_per_host or self.tp

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: it contradicts itself.
        """
        if len(set(self.routes)) < len(self.routes):
            found = ", ".join(self.routes)
            raise ValueError(f"routes of engine {self.id} are {found}: each must stand once")
        if self.per_host > self.tp:
            raise ValueError(
                f"ranks_per_host of engine {self.id} is {self.ranks_per_host}: "
                f"must be at most its tp, {self.tp}"
            )


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
    device: bool
    """Lanes lie in memory of GPUs."""
    seconds: float
    """Until the last engine has it."""
    parts: tuple[PartExplained, ...]
    plan: RoundPlan | None = None


def explain(families: Sequence[Family], fleet: Fleet) -> Explanation:
    """Plan a round of `fleet` for a model.

    Raises:
        PlanError: the fleet contradicts itself, or it or the model is larger than a plan can be.
        MessageInvalid: the plan is too large for a message.
    """
    size, source = whole_bytes(families), fleet.source
    if size > MAX_BYTES:
        raise PlanError("model", f"{size:,} bytes", f"must be at most {MAX_BYTES:,}")
    _check_size(fleet)
    parts: dict[str, tuple[str, Join]] = {}
    for described in fleet.engines:
        for engine, join in _joins(described, families):
            if join.engine in parts:
                raise PlanError("id of an engine", join.engine, "it must be there once")
            parts[join.engine] = engine, join
    joins = [join for _, join in parts.values()]
    decision = plan_round(
        joins,
        version=0,
        round_id="explained",
        epoch=1,
        leader=joins[0].engine,
        now_ns=0,
        source=PlanSource(
            links=None if source.links is None else source.links.links,
            hosts=source.hosts,
            layout_bytes=size,
            files=source.files,
            memory=source.memory,
        ),
    )
    plan = decision.plan
    if plan is not None:
        encode(plan)  # what cannot be sent is no plan
    reasons = _reasons(plan)
    return Explanation(
        layout_bytes=size,
        tensors=sum(family.count for family in families),
        ranks=sum(len(join.ranks) for join in joins),
        hosts=len({join.host_id for join in joins}),
        lanes=0 if plan is None else len(plan.groups),
        bucket_bytes=0 if plan is None else plan.bucket_bytes,
        slots=0 if plan is None else plan.slots,
        device=plan is not None and plan.device,
        seconds=max((cost.seconds for cost in decision.costs.values()), default=0.0),
        parts=tuple(_part(engine, join, decision, reasons) for engine, join in parts.values()),
        plan=plan,
    )


def _check_size(fleet: Fleet) -> None:
    """
    Raises:
        PlanError: it is more than one plan holds.
    """
    ranks = sum(engine.count * engine.tp for engine in fleet.engines)
    if ranks > MAX_RANKS:
        raise PlanError("fleet", f"{ranks:,} ranks", f"must be at most {MAX_RANKS:,}")
    parts = sum(engine.count * -(-engine.tp // engine.per_host) for engine in fleet.engines)
    if parts > MAX_PARTS:
        found = f"{parts:,} engines, or parts of them on a host"
        raise PlanError("fleet", found, f"a plan holds at most {MAX_PARTS:,}")


def _joins(described: FleetEngine, families: Sequence[Family]) -> list[tuple[str, Join]]:
    """(Engine id, join of a part) of engines that are alike."""
    per_host = described.per_host
    parts = -(-described.tp // per_host)
    hosts = described.hosts
    if hosts and len(hosts) != parts * described.count:
        limit = f"must be one for each of {described.count} engines x {parts} parts"
        raise PlanError(f"hosts of engine {described.id}", f"{len(hosts)} long", limit)
    need = rank_bytes(families, described.tp, expert_parallel=described.expert_parallel)
    links, joins = described.links.links, []
    for number in range(described.count):
        engine = described.id if described.count == 1 else f"{described.id}-{number}"
        for part in range(parts):
            name = engine if parts == 1 else f"{engine}-part{part}"
            if len(name) > MAX_ID_CHARS:
                limit = f"it must have at most {MAX_ID_CHARS} characters"
                raise PlanError("id of an engine", name, limit)
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
                        device_bytes=described.device_bytes,
                        routes=described.routes,
                    )
                    for rank in range(part * per_host, min((part + 1) * per_host, described.tp))
                ),
                links=links,
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
    return PartExplained(
        engine=engine,
        part=join.engine,
        host=join.host_id,
        ranks=len(join.ranks),
        route=route,
        reason=reasons.get(join.engine) or decision.refused[join.engine],
        cost=cost,
        rank_bytes=join.ranks[0].need_bytes,
        rejected=_rejected(join, route, decision),
    )


def _rejected(join: Join, route: RouteName | None, decision: RoundDecision) -> dict[RouteName, str]:
    """Every other route -> why not."""
    engine, rejected = join.engine, {}
    other = decision.others.get(engine)
    for name in _ROUTES:
        if name == route:
            continue
        if name not in join.ranks[0].routes:
            rejected[name] = "it is not offered"
        elif route is None:
            rejected[name] = decision.refused[engine]
        elif other is not None and name == other.route:
            rejected[name] = f"{seconds_text(other.seconds)}, at the pace of {other.limit}"
        elif route == "local" or (name == "p2p" and "local" in join.ranks[0].routes):
            rejected[name] = "nothing is nearer than local"
        elif name == "broadcast":
            rejected[name] = decision.apart[engine]
        else:
            rejected[name] = "an engine that offers only broadcast needs it there"
    return rejected
