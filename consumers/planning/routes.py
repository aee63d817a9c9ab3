"""Which way the bytes take to every rank of every engine of a round. Pure: decides, moves nothing.

The plan depends on nothing but the arguments, in whatever order the joins came:

- `local` wherever a rank offers it: nothing is staged, and nobody is waited for;
- `broadcast` for ranks that need the same bytes, are at least two, and cannot go `local`: the r-th
  ranks of engines that are cut alike form one group, so that every network card carries its share;
- `p2p` otherwise, and for whoever comes late: its peers are not disturbed.

An engine is planned whole or not at all: if one of its ranks has no usable route, it is refused,
and the others are planned without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct, structs

from weightbus.consumers.errors import PlanError
from weightbus.schemas.base import RouteName
from weightbus.schemas.rounds import (
    Budgets,
    CommitPolicy,
    EngineRoute,
    Group,
    Join,
    Member,
    RankOffer,
    RankRoute,
    RoundPlan,
)

__all__ = ("DEFAULT_PLAN_LIMITS", "PlanLimits", "RoundDecision", "plan_round")

_LONGEST_S = 86_400.0
"""The longest duration that a plan can hold: one day."""

Need = tuple[int, str]
"""(rank, needs digest): ranks of equal needs read the same bytes."""


class PlanLimits(Struct, frozen=True, kw_only=True):
    """What a plan may ask of the machines that run it."""

    bucket_bytes: int = 256 * 2**20
    """Staging bucket, if every rank that stages has room for it."""
    min_bucket_bytes: int = 16 * 2**20
    """A bucket is never smaller: transfers would wait more than they move."""
    staging_share: float = 0.5
    """Part of a rank's free memory that its staging buckets may take."""
    staging_buckets: int = 2
    """Buckets that a rank holds at once."""
    slowest_bytes_per_s: int = 200 * 2**20
    """A host that moves its bytes slower than this has failed; it sets a large model's deadline."""


DEFAULT_BUDGETS = Budgets()
DEFAULT_PLAN_LIMITS = PlanLimits()


class RoundDecision(Struct, frozen=True, kw_only=True):
    """A plan, and who has no part in it."""

    plan: RoundPlan | None
    """None: every engine was refused."""
    refused: dict[str, str]
    """Engine id -> why it cannot take part, in order of the ids."""


def plan_round(
    joins: Sequence[Join],
    *,
    version: int,
    round_id: str,
    epoch: int,
    leader: str,
    now_ns: int,
    late: bool = False,
    commit: CommitPolicy = "each",
    budgets: Budgets = DEFAULT_BUDGETS,
    limits: PlanLimits = DEFAULT_PLAN_LIMITS,
) -> RoundDecision:
    """Assign every rank of every engine that joined a route which it offers.

    Args:
        joins: one or more; if one engine joined several times, its latest counts.
        leader: engine id of the round's leader.
        now_ns: goes into the plan; nothing depends on it.
        late: the engines must disturb no peer: `local` or `p2p` only.
        budgets: deadlines of the plan; those of the transfer grow with the bytes to be moved.

    Raises:
        PlanError: there is no join, or one is of another model, version or round.
    """
    accepted = _latest(joins, version, round_id)
    refused: dict[str, str] = {}
    while True:  # whoever is refused may leave a peer alone, so everyone is looked at again
        peers = {} if late else _peers(accepted)
        unusable = {}
        for engine, join in accepted.items():
            reason = _why_unusable(join, peers, late)
            if reason is not None:
                unusable[engine] = reason
        if not unusable:
            break
        refused |= unusable
        accepted = {engine: join for engine, join in accepted.items() if engine not in unusable}
    refused = {engine: refused[engine] for engine in sorted(refused)}
    if not accepted:
        return RoundDecision(plan=None, refused=refused)
    groups = {need: members for need, members in peers.items() if len(members) > 1}
    numbers = {need: number for number, need in enumerate(groups)}
    hosts = {engine: join.host_id for engine, join in accepted.items()}
    plan = RoundPlan(
        model=joins[0].model,
        version=version,
        round=round_id,
        epoch=epoch,
        leader=leader,
        engines=tuple(
            EngineRoute(
                engine=engine,
                ranks=tuple(
                    _rank_route(offer, peers, numbers, hosts, late) for offer in _by_rank(join)
                ),
            )
            for engine, join in accepted.items()
        ),
        groups=tuple(Group(members=tuple(members)) for members in groups.values()),
        bucket_bytes=_bucket_bytes(accepted.values(), limits),
        budgets=_scaled(budgets, accepted.values(), limits),
        commit=commit,
        created_ns=now_ns,
    )
    return RoundDecision(plan=plan, refused=refused)


def _latest(joins: Sequence[Join], version: int, round_id: str) -> dict[str, Join]:
    """The join that counts of every engine, in order of the ids."""
    if not joins:
        raise PlanError("round", f"{round_id} without a join", "at least one engine must join")
    expected = (joins[0].model, version, round_id)
    latest: dict[str, Join] = {}
    for join in joins:
        found = (join.model, join.version, join.round)
        if found != expected:
            raise PlanError(f"join of engine {join.engine}", found, f"must be of {expected}")
        known = latest.get(join.engine)
        if known is None or join.joined_ns >= known.joined_ns:
            latest[join.engine] = join
    return dict(sorted(latest.items()))


def _by_rank(join: Join) -> list[RankOffer]:
    return sorted(join.ranks, key=lambda offer: offer.rank)


def _peers(accepted: Mapping[str, Join]) -> dict[Need, list[Member]]:
    """Who could share a broadcast, by what they need; members of one host stand together."""
    peers: dict[Need, list[Member]] = {}
    for join in sorted(accepted.values(), key=lambda join: (join.host_id, join.engine)):
        for offer in join.ranks:
            if "local" not in offer.routes and "broadcast" in offer.routes:
                need = (offer.rank, offer.needs_digest)
                peers.setdefault(need, []).append(Member(join.engine, offer.rank))
    return {need: peers[need] for need in sorted(peers)}


def _route_of(offer: RankOffer, peers: Mapping[Need, Sequence[Member]]) -> RouteName | None:
    """The nearest route that a rank offers and can take; None: there is none."""
    if "local" in offer.routes:
        return "local"
    if "broadcast" in offer.routes and len(peers.get((offer.rank, offer.needs_digest), ())) > 1:
        return "broadcast"
    return "p2p" if "p2p" in offer.routes else None


def _why_unusable(join: Join, peers: Mapping[Need, Sequence[Member]], late: bool) -> str | None:
    """Why an engine cannot be planned; None: every rank has a route."""
    numbers = [offer.rank for offer in join.ranks]
    if len(set(numbers)) < len(numbers):
        return str(PlanError(f"join of engine {join.engine}", numbers, "ranks must be unique"))
    for offer in _by_rank(join):
        if _route_of(offer, peers) is None:
            offered = f"offering {', '.join(offer.routes) or 'no route'}"
            limit = "must offer local or p2p" if late else "no other rank needs the same bytes"
            return str(PlanError(f"rank {offer.rank} of engine {join.engine}", offered, limit))
    return None


def _rank_route(
    offer: RankOffer,
    peers: Mapping[Need, Sequence[Member]],
    numbers: Mapping[Need, int],
    hosts: Mapping[str, str],
    late: bool,
) -> RankRoute:
    """The route of a rank that has one, and why in a few words."""
    need = (offer.rank, offer.needs_digest)
    route = _route_of(offer, peers)
    if route == "local":
        reason = "its host can map every segment"
        return RankRoute(rank=offer.rank, route="local", reason=reason)
    if route == "broadcast":
        members = peers[need]
        count = len({hosts[member.engine] for member in members})
        reason = f"{len(members)} ranks on {count} host{'s' * (count > 1)} need the same bytes"
        return RankRoute(rank=offer.rank, route="broadcast", group=numbers[need], reason=reason)
    if late:
        reason = "it came late: no peer is disturbed"
    elif "broadcast" in offer.routes:
        reason = "no other rank needs the same bytes"
    else:
        reason = "it offers nothing nearer"
    return RankRoute(rank=offer.rank, route="p2p", reason=reason)


def _bucket_bytes(joins: Iterable[Join], limits: PlanLimits) -> int:
    """The bucket that every rank which stages has room for; a rank that names no figure has any."""
    share = limits.staging_share / limits.staging_buckets
    room = [
        int(offer.free_bytes * share)
        for join in joins
        for offer in join.ranks
        if "local" not in offer.routes and offer.free_bytes
    ]
    return max(limits.min_bucket_bytes, min([limits.bucket_bytes, *room]))


def _scaled(budgets: Budgets, joins: Iterable[Join], limits: PlanLimits) -> Budgets:
    """Deadlines that a host which moves its bytes at the slowest rate still meets."""
    of_host: dict[str, int] = {}
    for join in joins:
        need_bytes = sum(offer.need_bytes for offer in join.ranks)
        of_host[join.host_id] = of_host.get(join.host_id, 0) + need_bytes
    slowest_s = max(of_host.values()) / limits.slowest_bytes_per_s
    transfer_s = min(max(budgets.transfer_s, slowest_s), _LONGEST_S)
    whole_s = budgets.prepare_s + transfer_s + budgets.commit_s
    round_s = min(max(budgets.round_s, whole_s), _LONGEST_S)
    return structs.replace(budgets, transfer_s=transfer_s, round_s=round_s)
